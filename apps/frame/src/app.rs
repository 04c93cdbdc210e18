//! The process: arguments, EAL, ports, memory, sandbox.

use std::collections::BTreeSet;
use std::process::{ExitCode, Termination};

use clap::Parser;
use vireo_bus_pci::Bus;
use vireo_drivers::memory;
use vireo_drivers::ports::{self, OpenPort};
use vireo_drivers::table::Drivers;
use vireo_eal::args::{self, Outcome, Program};
use vireo_eal::lcore::StopFlag;
use vireo_eal::{Eal, Result, program};

use crate::ports::{Config, Ports};
use crate::route::{Route, share_out};

/// What every application has: the EAL, the drivers and the flag that ends the run.
pub struct App {
    /// The EAL, started.
    pub eal: Eal,
    /// The drivers that ports may have.
    pub drivers: Drivers,
    /// Set by SIGINT, SIGTERM and SIGHUP, or by the application.
    pub stop: StopFlag,
}

/// Reads the arguments of the process (the EAL's, `--`, and `A`), starts the EAL and runs `application`.
///
/// An error is printed on one line of standard error, after the name of `A`'s command, and gives the exit code. Help on `A`
/// is part of the EAL's `--help`, so `A` says `disable_help_flag = true`.
pub fn main<A: Parser, T: Termination>(
    drivers: Drivers,
    application: impl FnOnce(&App, A) -> Result<T>,
) -> ExitCode {
    let mut command = A::command();
    let usage = command.render_help().to_string();
    program::exit_code(command.get_name(), run(drivers, &usage, application))
}

fn run<A: Parser, T: Termination>(
    drivers: Drivers,
    usage: &str,
    application: impl FnOnce(&App, A) -> Result<T>,
) -> Result<ExitCode> {
    let (device_keys, vdev_keys) = (drivers.device_keys(), drivers.vdev_keys());
    let program = Program { usage, device_keys: &device_keys, vdev_keys: &vdev_keys };
    let parsed = match args::parse(std::env::args_os(), &program)? {
        Outcome::Print(text) => {
            program::print(&text)?;
            return Ok(ExitCode::SUCCESS);
        }
        Outcome::Run(parsed) => parsed,
    };
    let own = args::parse_app(parsed.app)?;
    let stop = StopFlag::on_signals()?;
    let app = App { eal: Eal::init(parsed.eal)?, drivers, stop };
    Ok(application(&app, own)?.report())
}

impl App {
    /// Opens the ports that the EAL arguments choose: PCI functions by address, then virtual devices in the order given.
    ///
    /// # Errors
    /// At the first port that is unavailable; `Usage` when the ports cannot use the addresses of `--iova-mode`.
    pub fn open_ports(&self) -> Result<Vec<OpenPort>> {
        let open = ports::open(&self.eal, &self.drivers, &Bus::default(), &self.stop)?;
        self.eal.iova_mode(open.iter().any(OpenPort::is_physical))?;
        Ok(open)
    }

    /// Shares the ways between ports out to all lcores, each lcore as many as the next. See [`share_out`].
    ///
    /// # Errors
    /// `Unavailable` when there are no ways, because there are no ports.
    pub fn share_out(&self, ways: &[(usize, usize)], pairs: u16) -> Result<Vec<Route>> {
        share_out(ways, pairs, &self.eal.lcores.ids(), None)
    }

    /// Reserves memory for the ports of `routes`, with their rings, as the EAL arguments ask for it, and maps it. The
    /// other ports of `open` stay open and are not started.
    ///
    /// # Errors
    /// As for [`memory::reserve`]; `Usage` when a pool cannot have so many buffers.
    pub fn reserve(&self, open: Vec<OpenPort>, routes: Vec<Route>, config: &Config) -> Result<Ports> {
        let lcores = &self.eal.lcores;
        let used: Vec<&OpenPort> =
            Route::ports(&routes).into_iter().filter_map(|port| open.get(port)).collect();
        let nodes: BTreeSet<u32> = used.iter().filter_map(|open| open.node).collect();
        let need = config.need(used.len(), lcores.ids().len() * nodes.len().max(1));
        let memory = memory::reserve(&self.eal, &need, &used)?;
        let served = routes.iter().flat_map(|route| [route.from, route.to].map(|port| (route.lcore, port)));
        memory::warn_of_distance(
            lcores,
            &memory,
            served.filter_map(|(lcore, port)| Some((lcore, open.get(port)?))),
        );
        Ports::new(open, routes, memory, &need)
    }

    /// Gives up what only set-up needed: root (`--user`), then files and system calls (unless `--no-sandbox`). To be
    /// called once, when the ports run and before lcores do.
    ///
    /// # Errors
    /// As for [`Eal::confine`].
    pub fn confine(&self) -> Result<()> {
        ports::confine(&self.eal)
    }
}
