//! Forwarders that are not Vireo's, to compare with: on the same NICs, from the same generator.

mod bridge;

use std::collections::BTreeMap;

use clap::ValueEnum;
use vireo_bus_pci::{Bus, PciInfo};
use vireo_eal::Result;

use self::bridge::Bridge;
use crate::process::Process;
use crate::testpmd::{self, TestpmdArgs};

/// A forwarder in place of Vireo's.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Reference {
    /// Linux's bridge, on the kernel's drivers
    Bridge,
    /// DPDK's testpmd, which rewrites addresses as l2fwd does, in mode container
    Testpmd,
}

const BRIDGE: &str = "bridge";
const TESTPMD: &str = "testpmd";

impl Reference {
    /// Name in recordings.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Bridge => BRIDGE,
            Self::Testpmd => TESTPMD,
        }
    }

    /// What a name in a recording means.
    pub(crate) fn describe(name: &str) -> &'static str {
        match name {
            BRIDGE => {
                "Linux's bridge between the forwarder's two NICs, on the kernel's drivers; their interrupts on the \
                       forwarder's core"
            }
            TESTPMD => "DPDK's testpmd with --forward-mode=mac, in mode container, on the forwarder's core",
            _ => "a forwarder that this Vireo does not know",
        }
    }

    /// Why it cannot forward between such NICs, where that is known beforehand.
    pub(crate) fn unfit(self, nic: &PciInfo) -> Option<&'static str> {
        // 82540EM.
        (self == Self::Testpmd && (nic.id.vendor, nic.id.device) == (0x8086, 0x100e))
            .then_some("DPDK's driver hangs on QEMU's 82540EM under VFIO")
    }

    /// Fails if this machine has not what it takes.
    pub(crate) fn check(self, testpmd: &TestpmdArgs) -> Result<()> {
        match self {
            Self::Bridge => bridge::check(),
            Self::Testpmd => testpmd.check(),
        }
    }

    /// Makes it forward between two NICs, on `cpu`. Between the start of the generator's NICs and the first frame,
    /// [`Forwarder::await_forwarding`] has to be called.
    pub(crate) fn start<'a>(
        self,
        bus: &'a Bus,
        inner: &[PciInfo; 2],
        cpu: usize,
        testpmd: &TestpmdArgs,
    ) -> Result<Forwarder<'a>> {
        match self {
            Self::Bridge => Bridge::start(bus, inner, cpu).map(Forwarder::Bridge),
            Self::Testpmd => {
                // Without --in-memory, testpmd leaves its memory behind, as files on hugetlbfs.
                let addresses = inner.each_ref().map(|info| info.address);
                let command = testpmd.command(cpu, addresses, &["--in-memory"]);
                testpmd::start_on(cpu, command, None).map(Forwarder::Testpmd)
            }
        }
    }
}

/// A reference that runs. Dropped, it gives the NICs back to VFIO.
pub(crate) enum Forwarder<'a> {
    Bridge(Bridge<'a>),
    Testpmd(Process),
}

impl Forwarder<'_> {
    /// Waits until it forwards.
    pub(crate) fn await_forwarding(&mut self) -> Result<()> {
        match self {
            Self::Bridge(_) => Ok(()),
            Self::Testpmd(process) => testpmd::await_forwarding(process),
        }
    }

    /// Whether frames leave with the addresses with which they came.
    pub(crate) fn keeps_addresses(&self) -> bool {
        matches!(self, Self::Bridge(_))
    }

    /// From here on, what is lost counts.
    pub(crate) fn begin(&mut self) {
        if let Self::Bridge(bridge) = self {
            bridge.begin();
        }
    }

    /// Ends it; gives what it counted as lost, of `lost` packets that did not come back.
    pub(crate) fn stop(self, lost: u64) -> Result<BTreeMap<String, u64>> {
        match self {
            Self::Bridge(bridge) => Ok(bridge.losses_when(lost)),
            Self::Testpmd(process) => testpmd::stop(process),
        }
    }
}
