//! The guest's cases, grouped by boot; each boot provides a machine.

mod bench;
mod devbind;
mod doctor;
pub(crate) mod echo;
mod forward;
mod group;
mod inject;
mod interrupts;
mod isolation;
mod limits;
pub(crate) mod machine;
mod numa;
mod opens;
mod privilege;
mod recover;
mod reference;
mod refuse;
mod secondary;
mod signals;
mod sleep;
pub(crate) mod soak;
pub(crate) mod takeover;
mod telemetry;
mod traffic;

use std::str::FromStr;

use self::machine::{NICS, Nic, Role, set};
use self::opens::Node;
use crate::case::Cases;

/// Kind of boot. Each is a different machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) enum Boot {
    /// An IOMMU that translates for every NIC.
    Iommu,
    /// No IOMMU, and VFIO's unsafe no-IOMMU mode enabled.
    Noiommu,
    /// An IOMMU of 39 bits, which does not reach IOVAs that equal virtual addresses.
    Narrow,
    /// virtio-net that bypasses the IOMMU, which is QEMU's default.
    Bypass,
    /// An IOMMU that does not remap interrupts: a NIC could forge any interrupt.
    UnsafeMsi,
    /// Two functions of one slot and therefore of one IOMMU group.
    SharedGroup,
    /// Two NUMA nodes, each with half of the memory and one CPU.
    Numa,
    /// igb behind root ports, which needs a newer QEMU than Debian 12 has.
    Igb,
    /// As `Igb`, without an IOMMU.
    IgbNoiommu,
}

/// All boots, in the order in which they run.
pub(crate) const BOOTS: [Boot; 9] = [
    Boot::Iommu,
    Boot::Noiommu,
    Boot::Narrow,
    Boot::Bypass,
    Boot::UnsafeMsi,
    Boot::SharedGroup,
    Boot::Numa,
    Boot::Igb,
    Boot::IgbNoiommu,
];

impl Boot {
    /// Name of the boot.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Iommu => "iommu",
            Self::Noiommu => "noiommu",
            Self::Narrow => "narrow",
            Self::Bypass => "bypass",
            Self::UnsafeMsi => "unsafe-msi",
            Self::SharedGroup => "shared-group",
            Self::Numa => "numa",
            Self::Igb => "igb",
            Self::IgbNoiommu => "igb-noiommu",
        }
    }

    /// Options of `lab run` that provide the boot's machine.
    pub(crate) fn lab_options(self) -> &'static [&'static str] {
        match self {
            Self::Iommu => &["--kernel-arg", "hugepagesz=1G"],
            Self::Noiommu => &["--no-iommu"],
            Self::Narrow => &[
                "--nics",
                "virtio-net,e1000e",
                "--qemu-arg",
                "-global",
                "--qemu-arg",
                "intel-iommu.aw-bits=39",
            ],
            Self::Bypass => &["--nics", "virtio-net,e1000e", "--no-iommu-platform"],
            Self::UnsafeMsi => {
                &["--nics", "e1000e", "--qemu-arg", "-global", "--qemu-arg", "intel-iommu.intremap=off"]
            }
            Self::SharedGroup => &[
                "--nics",
                "e1000e",
                "--qemu-arg",
                "-device",
                "--qemu-arg",
                "e1000,addr=0x10.0,multifunction=on,romfile=",
                "--qemu-arg",
                "-device",
                "--qemu-arg",
                "e1000,addr=0x10.1,romfile=",
            ],
            Self::Numa => &[
                "--nics",
                "e1000e",
                "--cpus",
                "2",
                "--mem",
                "2048",
                "--qemu-arg",
                "-object",
                "--qemu-arg",
                "memory-backend-ram,id=m0,size=1024M",
                "--qemu-arg",
                "-object",
                "--qemu-arg",
                "memory-backend-ram,id=m1,size=1024M",
                "--qemu-arg",
                "-numa",
                "--qemu-arg",
                "node,memdev=m0,cpus=0",
                "--qemu-arg",
                "-numa",
                "--qemu-arg",
                "node,memdev=m1,cpus=1",
            ],
            Self::Igb => &["--nics", "igb"],
            Self::IgbNoiommu => &["--nics", "igb", "--no-iommu"],
        }
    }

    /// Kinds of NIC for cases that run on each kind.
    fn nics(self) -> &'static [Nic] {
        match self {
            Self::Igb | Self::IgbNoiommu => &[Nic::Igb],
            _ => &NICS,
        }
    }

    /// Mode that works in this boot, for programs that are not the subject of a case.
    fn generator_mode(self) -> &'static str {
        match self {
            Self::Noiommu | Self::IgbNoiommu => "noiommu",
            _ => "auto",
        }
    }

    /// Cases of the boot.
    pub(crate) fn cases(self) -> Cases {
        let mut cases = Cases::default();
        match self {
            Self::Iommu => iommu(&mut cases),
            Self::Noiommu => noiommu(&mut cases),
            Self::Narrow => narrow(&mut cases),
            Self::Bypass => bypass(&mut cases),
            Self::UnsafeMsi => unsafe_msi(&mut cases),
            Self::SharedGroup => group::cases(&mut cases, self),
            Self::Numa => numa::cases(&mut cases),
            Self::Igb => igb(&mut cases, self, &MAPPED),
            Self::IgbNoiommu => igb(&mut cases, self, &PHYSICAL),
        }
        cases
    }
}

impl FromStr for Boot {
    type Err = String;

    fn from_str(name: &str) -> Result<Self, String> {
        BOOTS.into_iter().find(|boot| boot.name() == name).ok_or_else(|| {
            let names = BOOTS.map(Self::name).join(", ");
            format!("there is no boot '{name}'; the boots are {names}")
        })
    }
}

const MAPPED: [&str; 3] = ["container", "cdev", "compat"];
const PHYSICAL: [&str; 2] = ["noiommu", "noiommu-cdev"];

/// Lets the cases that `add` adds run with `--full` only, if `condition` is true.
fn in_full_if(cases: &mut Cases, condition: bool, add: impl FnOnce(&mut Cases)) {
    let first = cases.0.len();
    add(cases);
    for case in &mut cases.0[first..] {
        case.in_full_if(condition);
    }
}

/// Adds the cases of what drivers do in the same way in each mode. Without `--full`, they run with an IOMMU
/// only.
fn drivers_alone(cases: &mut Cases, boot: Boot, mode: &'static str) {
    in_full_if(cases, PHYSICAL.contains(&mode), |cases| {
        forward::variants(cases, boot, mode);
        forward::long_frames(cases, boot, mode);
        forward::address_filter(cases, boot, mode);
    });
}

fn iommu(cases: &mut Cases) {
    let boot = Boot::Iommu;
    forward::each_nic_in_each_mode(cases, boot, &MAPPED);
    forward::mixed_modes(cases, boot, "container", "cdev");
    forward::mixed_modes(cases, boot, "container", "compat");
    forward::mixed_modes(cases, boot, "cdev", "compat");
    drivers_alone(cases, boot, "cdev");
    forward::small_pages(cases, boot);
    forward::chosen_modes(cases, boot);
    opens::opens(cases, "cdev opens no group", "cdev", &[Node::Iommufd, Node::Cdev]);
    opens::opens(
        cases,
        "container opens no iommufd and no cdev",
        "container",
        &[Node::Container, Node::Group],
    );
    opens::opens(cases, "compat opens groups and iommufd only", "compat", &[Node::Iommufd, Node::Group]);
    for mode in MAPPED {
        opens::by_other_names(cases, mode);
        opens::hands_over(cases, mode);
        opens::leaves(cases, mode);
        interrupts::of_each_nic(cases, boot, mode);
        sleep::cases(cases, boot, mode);
        takeover::cases(cases, boot, mode);
        secondary::cases(cases, boot, mode);
        in_full_if(cases, mode != "cdev", |cases| signals::end_in_order(cases, boot, mode));
        // compat opens as container does, and maps as cdev does.
        in_full_if(cases, mode == "compat", |cases| {
            signals::survive_kills(cases, boot, mode);
            recover::cases(cases, boot, mode);
        });
        isolation::with_iommu(cases, boot, mode);
    }
    telemetry::cases(cases, boot, "cdev");
    isolation::pins(cases);
    interrupts::iommufd_alone(cases);
    privilege::cases(cases, boot);

    refuse::refusals(cases, boot, refuse::BAD_ARGUMENTS);
    refuse::refusals(cases, boot, refuse::WITH_IOMMU);
    let e1000e = || Nic::E1000e.bdf(Role::FwdRx);
    for mode in PHYSICAL {
        let name = format!("refused: {mode} with an IOMMU");
        refuse::mode_refused(cases, boot, name, (mode, e1000e()), "use --vfio-mode cdev or container");
    }
    devbind::cases(cases);
    bench::cases(cases, boot, "cdev");
    reference::cases(cases);
    doctor::cases(cases, boot, "container");
    refuse::bound_to_the_kernel(cases, boot, "cdev");
    refuse::not_loaded(cases, boot);
    limits::no_hugepages(cases, "cdev");
    limits::huge_dirs(cases, boot);
    refuse::missing_nodes(cases, boot);
    refuse::wrong_nodes(cases, boot);
    limits::little_memlock(cases, boot);
    limits::entry_limit(cases, boot);
    refuse::permissions(cases, boot);
    refuse::hidden_user(cases);
    limits::cores(cases, boot);
    limits::output_fails(cases, boot);
    for mode in MAPPED {
        refuse::in_use(cases, boot, mode, mode);
        refuse::same_prefix(cases, boot, mode);
    }
    for (first, second) in [("container", "cdev"), ("cdev", "container"), ("compat", "cdev")] {
        refuse::in_use(cases, boot, first, second);
    }
    for mode in MAPPED {
        inject::cases(cases, mode);
    }
}

fn noiommu(cases: &mut Cases) {
    let boot = Boot::Noiommu;
    forward::each_nic_in_each_mode(cases, boot, &PHYSICAL);
    forward::mixed_modes(cases, boot, "noiommu", "noiommu-cdev");
    drivers_alone(cases, boot, "noiommu");
    let name = "noiommu opens no iommufd and no cdev";
    opens::opens(cases, name, "noiommu", &[Node::Container, Node::Group]);
    for mode in PHYSICAL {
        opens::by_other_names(cases, mode);
        opens::leaves(cases, mode);
        interrupts::of_each_nic(cases, boot, mode);
        sleep::cases(cases, boot, mode);
        takeover::cases(cases, boot, mode);
        secondary::cases(cases, boot, mode);
        signals::survive_kills(cases, boot, mode);
        isolation::without_iommu(cases, mode);
    }
    signals::end_in_order(cases, boot, "noiommu");
    interrupts::iommufd_alone(cases);
    privilege::cases_without_iommu(cases, boot);

    refuse::refusals(cases, boot, refuse::BAD_ARGUMENTS);
    refuse::refusals(cases, boot, refuse::WITHOUT_IOMMU);
    for mode in MAPPED {
        let nic = (mode, Nic::E1000e.bdf(Role::FwdRx));
        refuse::mode_refused(
            cases,
            boot,
            format!("refused: {mode} without an IOMMU"),
            nic,
            "--vfio-mode noiommu",
        );
    }
    doctor::cases(cases, boot, "noiommu");
    refuse::needs_newer_kernel(cases, boot);
    refuse::bound_to_the_kernel(cases, boot, "noiommu");
    refuse::switched_off(cases, boot);
    refuse::no_raw_io(cases, boot);
    limits::no_hugepages(cases, "noiommu");
    signals::memory_outlives_the_nic(cases);
    limits::output_fails(cases, boot);
    refuse::in_use(cases, boot, "noiommu", "noiommu");
    inject::cases(cases, "noiommu");
    noiommu_cdev_where_it_is(cases);
}

/// Makes cases of `noiommu-cdev` run on both kernels, because they are skipped on the default one.
fn noiommu_cdev_where_it_is(cases: &mut Cases) {
    for case in cases.0.iter_mut().filter(|case| case.name.contains("noiommu-cdev")) {
        case.on_both_kernels();
    }
}

/// Adds the cases of the igb driver and its NIC. The other boots show what is the same for each driver: each
/// mode on another kernel, two modes at a time, and a kill in each mode. These boots therefore use one kernel, except for
/// `noiommu-cdev`, and without `--full` a kill in one mode.
fn igb(cases: &mut Cases, boot: Boot, modes: &[&'static str]) {
    let [first, second, ..] = *modes else { return };
    in_full_if(cases, true, |cases| forward::mixed_modes(cases, boot, first, second));
    drivers_alone(cases, boot, first);
    for &mode in modes {
        // compat opens as container does, and maps as cdev does.
        in_full_if(cases, mode == "compat", |cases| forward::each_nic_in_each_mode(cases, boot, &[mode]));
        interrupts::of_each_nic(cases, boot, mode);
        sleep::cases(cases, boot, mode);
        takeover::cases(cases, boot, mode);
        secondary::cases(cases, boot, mode);
        in_full_if(cases, mode != MAPPED[0], |cases| signals::survive_kill(cases, boot, mode));
    }
    if boot == Boot::Igb {
        recover::cases(cases, boot, "cdev");
        in_full_if(cases, true, |cases| telemetry::cases(cases, boot, "cdev"));
    }
    // The default kernel does not have noiommu-cdev.
    for case in &mut cases.0 {
        if case.name.contains("noiommu-cdev") {
            case.in_full().on_both_kernels();
        }
    }
}

fn narrow(cases: &mut Cases) {
    for mode in MAPPED {
        for nic in [Nic::E1000e, Nic::VirtioNet] {
            cases.add(format!("{} behind 39 bits, {mode}", nic.name()), move |context| {
                forward::in_mode(context, Boot::Narrow, mode, nic, nic)
            });
        }
    }
}

fn bypass(cases: &mut Cases) {
    for mode in MAPPED {
        let name = format!("refused: virtio-net without ACCESS_PLATFORM, {mode}");
        let nic = (mode, Nic::VirtioNet.bdf(Role::FwdRx));
        refuse::mode_refused(cases, Boot::Bypass, name, nic, "iommu_platform=on");
    }
}

fn unsafe_msi(cases: &mut Cases) {
    for (mode, module) in [("container", "vfio_iommu_type1"), ("cdev", "iommufd"), ("compat", "iommufd")] {
        let parameter = format!("/sys/module/{module}/parameters/allow_unsafe_interrupts");
        let (consent, hint) = (parameter.clone(), format!("echo 1 > {parameter}"));
        cases
            .add(format!("refused: no isolated MSI, {mode}"), move |context| {
                doctor::unusable(context, mode, &Nic::E1000e.bdf(Role::FwdRx), (69, &hint)).map(drop)
            })
            .on_both_kernels();
        cases.add(format!("no isolated MSI and the user's consent, {mode}"), move |context| {
            let _consent = set(&consent, "1")?;
            let nic = Nic::E1000e;
            let start = traffic::forwarder(mode, nic, nic);
            traffic::forwards(context, mode, &start, nic, nic)?.opened(0, mode, "as requested")
        });
    }
}
