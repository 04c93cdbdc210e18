//! Forwarders other than Vireo's to compare with, on the same NICs and with the same generator.

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
    /// Name of the reference in recordings.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Bridge => BRIDGE,
            Self::Testpmd => TESTPMD,
        }
    }

    /// Describes a reference by its name in a recording.
    pub(crate) fn describe(name: &str) -> &'static str {
        match name {
            BRIDGE => {
                "Linux's bridge between the forwarder's two NICs, on the kernel's drivers; their interrupts on the \
                       forwarder's core"
            }
            TESTPMD => "DPDK's testpmd with --forward-mode=mac, in mode container, on the forwarder's core",
            _ => "a forwarder unknown to this Vireo",
        }
    }

    /// Returns why the reference cannot forward between such NICs, if that is known in advance.
    pub(crate) fn unsupported_reason(self, nic: &PciInfo) -> Option<&'static str> {
        // 82540EM.
        (self == Self::Testpmd && (nic.id.vendor, nic.id.device) == (0x8086, 0x100e))
            .then_some("DPDK's driver hangs on QEMU's 82540EM under VFIO")
    }

    /// Fails if this machine lacks what the reference needs.
    pub(crate) fn check(self, testpmd: &TestpmdArgs) -> Result<()> {
        match self {
            Self::Bridge => bridge::check(),
            Self::Testpmd => testpmd.check(),
        }
    }

    /// Starts to forward between two NICs, on `cpu`. [`Forwarder::await_forwarding`] must be called after the
    /// generator's NICs are started and before the first frame.
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
                // Without --in-memory, testpmd leaves its memory behind as files on hugetlbfs.
                let addresses = inner.each_ref().map(|info| info.address);
                let command = testpmd.command(cpu, addresses, &["--in-memory"]);
                testpmd::start_on(cpu, command, None).map(Forwarder::Testpmd)
            }
        }
    }
}

/// A running reference. Dropping it returns the NICs to VFIO.
pub(crate) enum Forwarder<'a> {
    Bridge(Bridge<'a>),
    Testpmd(Process),
}

impl Forwarder<'_> {
    /// Waits until the reference forwards.
    pub(crate) fn await_forwarding(&mut self) -> Result<()> {
        match self {
            Self::Bridge(_) => Ok(()),
            Self::Testpmd(process) => testpmd::await_forwarding(process),
        }
    }

    /// Returns whether frames leave with the addresses with which they arrived.
    pub(crate) fn keeps_addresses(&self) -> bool {
        matches!(self, Self::Bridge(_))
    }

    /// Starts to count losses.
    pub(crate) fn begin(&mut self) {
        if let Self::Bridge(bridge) = self {
            bridge.begin();
        }
    }

    /// Stops the reference. Returns what it counted as lost, out of `lost` packets that did not return.
    pub(crate) fn stop(self, lost: u64) -> Result<BTreeMap<String, u64>> {
        match self {
            Self::Bridge(bridge) => Ok(bridge.losses_when(lost)),
            Self::Testpmd(process) => testpmd::stop(process),
        }
    }
}
