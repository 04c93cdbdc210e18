//! `vfio-bench dma-proof`: aims a real NIC at memory that it was not given, and reports what stops it.
//!
//! The target is the address that a driver uses by mistake: the physical address of a page of this process.
//! With an IOMMU the write must not arrive, the kernel must report it, and the NIC must work again after a
//! reset. Without an IOMMU the write arrives.

mod kmsg;
mod nic;

use std::io::Write as _;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use clap::Args;
use serde::Serialize;
use vireo_bus_pci::{Bus, PciDevice, PciInfo};
use vireo_drivers::table::driver_of;
use vireo_eal::bdf::Bdf;
use vireo_eal::dma::{DmaBlock, DmaMemory, DmaRing, MemoryMap, Part};
use vireo_eal::mem::{Backing, Region};
use vireo_eal::vfio::{AddressSpace, Vfio, VfioMode};
use vireo_eal::{Error, ErrorKind, Result};

use self::kmsg::Kmsg;
use self::nic::{LoopNic, PAGE_WORDS};
use crate::report::write_json;

/// Aim a NIC at memory it was not given, in each mode, and report what stops it
#[derive(Args, Debug)]
pub(crate) struct DmaProofArgs {
    /// NIC of the e1000 family to aim; default: the first on vfio-pci
    #[arg(long, value_name = "BDF")]
    nic: Option<Bdf>,
    /// Second NIC, whose ring the first is aimed at; default: the next on vfio-pci, if any
    #[arg(long, value_name = "BDF")]
    neighbour: Option<Bdf>,
    /// Modes to test; without an IOMMU (noiommu, noiommu-cdev) the NIC writes to physical memory, a page of
    /// this process
    #[arg(long, value_name = "LIST", value_delimiter = ',', default_value = "container,cdev,compat")]
    modes: Vec<VfioMode>,
    /// Also write the result as JSON
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
}

/// Memory that a NIC is aimed at.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
enum Target {
    /// A page that is not mapped for the NIC, by its physical address.
    Unmapped,
    /// Memory that the NIC may only read.
    ReadOnly,
    /// The RX ring of another port in the same address space.
    SharedRing,
    /// The RX ring of another port in an address space of its own (`--isolate-ports`).
    IsolatedRing,
}

impl Target {
    fn words(self) -> &'static str {
        match self {
            Self::Unmapped => "a page that is not mapped, by its physical address",
            Self::ReadOnly => "memory that is mapped read-only",
            Self::SharedRing => "the ring of a port in the same address space",
            Self::IsolatedRing => "the ring of an isolated port",
        }
    }

    /// Returns whether an IOMMU must stop the write.
    fn is_guarded(self) -> bool {
        self != Self::SharedRing
    }
}

/// Outcome of one forbidden write.
#[derive(Debug, Serialize)]
struct Row {
    mode: &'static str,
    nic: String,
    target: Target,
    /// Address in the descriptor.
    address: String,
    /// Whether an IOMMU is between the NIC and memory.
    iommu: bool,
    /// Whether the write changed memory.
    landed: bool,
    /// The kernel's report.
    fault: Option<String>,
    /// Whether a frame arrived in the NIC's own buffer after a reset.
    works_after_reset: bool,
    /// Whether the outcome is as it must be.
    expected: bool,
}

#[derive(Debug, Serialize)]
struct Proof {
    /// Why the kernel's log could not be read; `None` if it could.
    kernel_log: Option<String>,
    rows: Vec<Row>,
}

pub(crate) fn dma_proof(args: &DmaProofArgs) -> Result<()> {
    let bus = Bus::default();
    let (nic, neighbour) = choose(args, &bus)?;
    let (mut kmsg, kernel_log) = match Kmsg::open() {
        Ok(kmsg) => (Some(kmsg), None),
        Err(error) => (None, Some(format!("/dev/kmsg: {error}"))),
    };
    let mut proof = Proof { kernel_log, rows: Vec::new() };
    for &mode in &args.modes {
        let mut rig = Rig::new(&bus, &nic, neighbour.as_ref(), mode, false)?;
        proof.rows.push(rig.aim(Target::Unmapped, &mut kmsg)?);
        proof.rows.push(rig.aim(Target::ReadOnly, &mut kmsg)?);
        if neighbour.is_none() {
            continue;
        }
        proof.rows.push(rig.aim(Target::SharedRing, &mut kmsg)?);
        drop(rig);
        if mode.has_iommu() {
            let mut rig = Rig::new(&bus, &nic, neighbour.as_ref(), mode, true)?;
            proof.rows.push(rig.aim(Target::IsolatedRing, &mut kmsg)?);
        }
    }
    std::io::stdout()
        .write_all(text(&proof).as_bytes())
        .map_err(|error| Error::io("cannot write to standard output", &error))?;
    args.json.as_ref().map_or(Ok(()), |path| write_json(path, &proof))?;
    match proof.rows.iter().filter(|row| !row.expected).count() {
        0 => Ok(()),
        wrong => {
            let what = format!("{wrong} of {} writes did not end as expected", proof.rows.len());
            Err(Error::new(ErrorKind::Protocol, what, "see the lines marked UNEXPECTED"))
        }
    }
}

/// Returns the NIC to aim, and the NIC to aim at.
fn choose(args: &DmaProofArgs, bus: &Bus) -> Result<(PciInfo, Option<PciInfo>)> {
    let known = |info: &PciInfo| driver_of(info.id) == Some("e1000");
    let mut free = bus.scan()?.into_iter().filter(|info| known(info) && bus.is_on_vfio(info));
    let mut pick = |asked: Option<Bdf>, other: Option<Bdf>| match asked {
        Some(address) => {
            let info = bus.find(address)?;
            if known(&info) {
                return Ok(Some(info));
            }
            let what = format!("cannot aim {address}");
            Err(Error::new(ErrorKind::Usage, what, format!("{} is not in the e1000 family", info.id)))
        }
        None => Ok(free.find(|info| Some(info.address) != other)),
    };
    let nic = pick(args.nic, args.neighbour)?.ok_or_else(|| {
        Error::new(
            ErrorKind::Unavailable,
            "cannot aim a NIC",
            "no NIC of the e1000 family is bound to vfio-pci",
        )
        .with_hint("run: vireo-devbind --status")
    })?;
    let neighbour = pick(args.neighbour, Some(nic.address))?;
    Ok((nic, neighbour))
}

/// The NIC, its neighbor, and the memory that the NIC is aimed at. Fields drop in declaration order: the NICs
/// before the memory, to which they hold references too.
struct Rig {
    nic: LoopNic,
    neighbour: Option<LoopNic>,
    address: Bdf,
    mode: VfioMode,
    /// A page of this process that is mapped for no device. `physical` is its physical address.
    canary: DmaRing<u64>,
    physical: u64,
    read_only: DmaRing<u64>,
}

/// Interval of the kernel's rate limit: after ten fault reports it logs none until the interval is over.
const REPORT_INTERVAL: Duration = Duration::from_secs(6);
/// Fill pattern of the canaries.
const UNTOUCHED: u64 = 0x5a5a_5a5a_5a5a_5a5a;

impl Rig {
    fn new(
        bus: &Bus,
        nic: &PciInfo,
        neighbour: Option<&PciInfo>,
        mode: VfioMode,
        isolated: bool,
    ) -> Result<Self> {
        let vfio = Vfio::new(None).isolate(isolated);
        let device = bus.open(nic, &vfio, mode)?;
        let other = neighbour.map(|info| bus.open(info, &vfio, mode)).transpose()?;
        let space = |device: &PciDevice| Arc::clone(device.vfio().space());
        // An e1000 on conventional PCI has 32 address bits only.
        std::iter::once(&device).chain(&other).for_each(|device| space(device).set_dma_mask(u32::MAX.into()));
        let part = |space: Arc<AddressSpace>| Part {
            read_write: LoopNic::MEMORY,
            read_only: PAGE_WORDS * 8,
            spaces: vec![space],
        };
        let parts: Vec<Part> =
            std::iter::once(&device).chain(&other).map(|device| part(space(device))).collect();
        let bytes = parts.iter().map(Part::bytes).sum();
        let spaces: Vec<Arc<AddressSpace>> = parts.iter().flat_map(|part| part.spaces.clone()).collect();
        let memory = MemoryMap::new(&spaces)?.add(Region::new(bytes, Backing::HugeMemfd)?, &parts)?;

        let region = Region::new(PAGE_WORDS * 8, Backing::HugeMemfd)?;
        let physical = region.physical_addresses()?.first().copied().unwrap_or_default();
        let len = memory[0].region().len() as u64;
        if memory[0].linear_iova().is_some_and(|iova| (iova..iova + len).contains(&physical)) {
            return Err(Error::new(
                ErrorKind::Unavailable,
                "cannot aim at an unmapped page",
                format!("the page's physical address {physical:#x} happens to be a mapped IOVA"),
            )
            .with_hint("run it again"));
        }
        Ok(Self {
            address: nic.address,
            mode,
            canary: DmaRing::new(&DmaMemory::map(region, &[])?, PAGE_WORDS, 4096)?,
            physical,
            read_only: DmaBlock::read_only(&memory[0], PAGE_WORDS * 8, 4096)?.carve(PAGE_WORDS)?,
            nic: LoopNic::new(device, &memory[0])?,
            neighbour: match (other, memory.get(1)) {
                (Some(device), Some(memory)) => Some(LoopNic::new(device, memory)?),
                _ => None,
            },
        })
    }

    /// Aims the NIC at `target`, after checking that the NIC works.
    fn aim(&mut self, target: Target, kmsg: &mut Option<Kmsg>) -> Result<Row> {
        let failed = |why: &str| {
            let what = format!("cannot aim {} in mode {}", self.address, self.mode);
            Error::new(ErrorKind::Protocol, what, why)
        };
        if !self.nic.works()? {
            return Err(failed("no frame arrived in its own buffer"));
        }
        let address = match target {
            Target::Unmapped => self.physical,
            Target::ReadOnly => self.read_only.iova(),
            Target::SharedRing | Target::IsolatedRing => {
                self.neighbour.as_ref().ok_or_else(|| failed("there is no second NIC"))?.ring().iova()
            }
        };
        let ring = self.neighbour.as_ref().map(LoopNic::ring);
        self.canary.fill(UNTOUCHED);
        self.read_only.fill(UNTOUCHED);
        ring.inspect(|ring| ring.fill(UNTOUCHED));
        let guarded = self.mode.has_iommu() && target.is_guarded();
        let mut fault = None;
        for pause in [Duration::ZERO, REPORT_INTERVAL] {
            std::thread::sleep(pause);
            self.nic.receive_into(address)?;
            let Some(kmsg) = kmsg.as_mut().filter(|_| guarded) else { break };
            fault = kmsg.fault(self.address, address);
            if fault.is_some() {
                break;
            }
        }
        let is_touched = |page: &DmaRing<u64>| (0..page.entries()).any(|at| page.load::<0>(at) != UNTOUCHED);
        let landed = is_touched(&self.canary)
            || is_touched(&self.read_only)
            || ring.is_some_and(|ring| {
                (0..ring.entries()).any(|at| [ring.load::<0>(at), ring.load::<1>(at)] != [UNTOUCHED; 2])
            });
        let works_after_reset = self.nic.works()?;
        let reported = fault.is_some() || kmsg.is_none() || !guarded;
        Ok(Row {
            mode: self.mode.name(),
            nic: self.address.to_string(),
            target,
            address: format!("{address:#x}"),
            iommu: self.mode.has_iommu(),
            landed,
            fault,
            works_after_reset,
            expected: landed != guarded && works_after_reset && reported,
        })
    }
}

/// Formats the result as text.
fn text(proof: &Proof) -> String {
    let mut text = String::new();
    for row in &proof.rows {
        let outcome = match (row.landed, row.iommu) {
            (false, _) => "nothing was written",
            (true, true) => "WRITTEN: nothing separates ports that share an address space",
            (true, false) => "WRITTEN: without an IOMMU nothing stops a NIC",
        };
        let kernel = match (&row.fault, &proof.kernel_log) {
            (Some(line), _) => line.as_str(),
            (None, Some(why)) => why.as_str(),
            (None, None) => "nothing",
        };
        let after = if row.works_after_reset { "works" } else { "DOES NOT WORK" };
        let wrong = if row.expected { "" } else { "UNEXPECTED: " };
        text += &format!(
            "{wrong}{}: {} aimed at {} ({})\n  memory: {outcome}\n  kernel: {kernel}\n  NIC after a reset: {after}\n",
            row.mode,
            row.nic,
            row.target.words(),
            row.address,
        );
    }
    text
}
