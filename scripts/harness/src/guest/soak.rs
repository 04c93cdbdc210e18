//! Soak of real NICs: one kind in one mode.

use std::path::Path;

use anyhow::{Result, bail};
use fastrand::Rng;
use serde::{Deserialize, Serialize};

use super::machine::{NICS, Nic, Role, need_mode};
use super::recover::{clear_bus_master, pull};
use super::traffic::{WINDOW, ports};
use crate::case::{Context, Report, run_once};
use crate::l2fwd::{L2fwd, Start};
use crate::process::Started;
use crate::soak::{Fault, Length, World, soak};

/// Parameters of one soak.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Plan {
    /// Kind of NIC.
    pub(crate) nic: String,
    /// VFIO mode.
    pub(crate) mode: String,
    /// Length of the soak.
    pub(crate) length: Length,
}

/// Soak of NICs. In every other epoch nothing disturbs the programs, and no frame may be lost. Two epochs in one
/// direction are followed by two in the other.
struct NicWorld {
    nic: Nic,
    mode: String,
    quiet: bool,
    /// Ports of the generator that send and receive. The forwarder's have the same numbers.
    ports: [usize; 2],
}

impl NicWorld {
    /// The NIC with which the forwarder receives, and the one with which it sends. Faults are the latter's: a NIC
    /// that receives nothing looks like one that nobody sends to.
    fn ends(&self) -> [Role; 2] {
        self.ports.map(|port| [Role::FwdRx, Role::FwdTx][port])
    }
}

impl World for NicWorld {
    fn forwarder(&self, _: &mut Rng) -> Start {
        Start::new(format!(
            "-l 1 --vfio-mode {} {} -- -p 3 -q 2 -T 0.5",
            self.mode,
            ports(self.nic, self.nic)
        ))
    }

    fn generator(&self) -> String {
        let (nic, mode, [from, to], [end, _]) = (self.nic, &self.mode, self.ports, self.ends());
        format!(
            "-l 0 --file-prefix gen --vfio-mode {mode} -a {} -a {} -- --tx-port {from} --rx-port {to} --dst-mac {} {WINDOW}",
            nic.bdf(Role::GenTx),
            nic.bdf(Role::GenRx),
            nic.mac(end)
        )
    }

    fn begin(&mut self, number: u64) -> Result<()> {
        self.quiet = number.is_multiple_of(2);
        self.ports = if number % 4 < 2 { [0, 1] } else { [1, 0] };
        Ok(())
    }

    fn faults(&self) -> &[Fault] {
        match self.quiet {
            true => &[Fault::None],
            false => &[
                Fault::LoseBusMaster,
                Fault::LoseLink,
                Fault::StopForwarder,
                Fault::None,
                Fault::KillForwarder,
                Fault::RestartForwarder,
            ],
        }
    }

    /// True in a quiet epoch, because frames sent before the forwarder runs would be lost. Otherwise either
    /// program may start first, since the generator has NICs of its own.
    fn forwarder_is_first(&self) -> bool {
        self.quiet
    }

    fn await_forwarder(&self, forwarder: &mut L2fwd) -> Result<()> {
        forwarder.await_event("that it forwards", |event| event["event"] == "forwarding")
    }

    fn await_generator(&self) -> Result<()> {
        Ok(())
    }

    fn disturb(&self, fault: Fault, forwarder: &mut L2fwd) -> Result<()> {
        let ([_, port], [_, end]) = (self.ports, self.ends());
        match fault {
            Fault::LoseBusMaster => {
                clear_bus_master(&self.nic.bdf(end))?;
                forwarder.await_state(port, "restarting")?;
                forwarder.await_state(port, "running")
            }
            Fault::LoseLink => {
                let up = pull(self.nic, end)?;
                forwarder.await_state(port, "link_down")?;
                drop(up);
                forwarder.await_state(port, "link_up")
            }
            other => bail!("{other:?} is not a fault of a machine"),
        }
    }

    fn expected_loss(&self, _: u64) -> Option<u64> {
        self.quiet.then_some(0)
    }

    /// False in an epoch with faults: QEMU lets frames overtake others while a NIC starts, see
    /// [`crate::pktgen::Stream::intact`].
    fn keeps_order(&self) -> bool {
        self.quiet
    }
}

/// Runs a soak, and reports the figures as a note in JSON.
pub(crate) fn run(plan: &Plan, programs: &Path, say: &mut dyn FnMut(String)) -> Report {
    let name = format!("soak of {}, {}", plan.nic, plan.mode);
    let (nic, mode) = (NICS.into_iter().find(|nic| nic.name() == plan.nic), plan.mode.clone());
    let Some(nic) = nic else {
        return Report { name, ..Report::failed("there are no such NICs".into()) };
    };
    let length = plan.length.clone();
    let soaked = |context: &Context| -> Result<()> {
        need_mode(&mode)?;
        let mut world = NicWorld { nic, mode, quiet: true, ports: [0, 1] };
        let figures = soak(context, &mut world, &length, say)?;
        context.note(serde_json::to_string(&figures)?);
        Ok(())
    };
    run_once(name, true, programs, &Started::default(), soaked)
}
