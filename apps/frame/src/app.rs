//! Process set-up: arguments, EAL, ports, memory, sandbox.

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

use crate::control::handover::ProgramRecord;
use crate::ports::{Config, Ports};
use crate::route::{Processes, Route, assign_lcores};

/// What every application needs: the EAL, the drivers and the stop flag.
pub struct App {
    /// The initialized EAL.
    pub eal: Eal,
    /// Drivers available to ports.
    pub drivers: Drivers,
    /// Ends the run. Set by SIGINT, SIGTERM and SIGHUP, or by the application.
    pub stop: StopFlag,
}

/// Parses the arguments of the process (EAL arguments, `--`, and `A`), starts the EAL and runs `application`.
///
/// An error is printed as one line on standard error, after the command name of `A`, and determines the exit
/// code. The EAL's `--help` includes the help of `A`, so `A` sets `disable_help_flag = true`.
pub fn main<A: Parser, T: Termination>(
    drivers: Drivers,
    application: impl FnOnce(&App, A) -> Result<T>,
) -> ExitCode {
    start(drivers, false, application)
}

/// Does the same as [`main`], for an application whose ports other processes can continue. Started a second time with
/// `--takeover` and otherwise the same arguments, it [takes over](Ports::forward) the ports of the running one, which
/// ends. Started with `--proc-type secondary`, it polls the queues of one of the [`Processes`](crate::Processes) that
/// share the ports. The state of a [hook](crate::Hook) does not move, so the hooks of `application` have none.
pub fn main_of_shareable<A: Parser, T: Termination>(
    drivers: Drivers,
    application: impl FnOnce(&App, A) -> Result<T>,
) -> ExitCode {
    start(drivers, true, application)
}

fn start<A: Parser, T: Termination>(
    drivers: Drivers,
    is_shareable: bool,
    application: impl FnOnce(&App, A) -> Result<T>,
) -> ExitCode {
    let command = A::command();
    let peer_of = is_shareable.then(|| command.get_name());
    program::exit_code(command.get_name(), run(drivers, peer_of, application))
}

fn run<A: Parser, T: Termination>(
    drivers: Drivers,
    peer_of: Option<&str>,
    application: impl FnOnce(&App, A) -> Result<T>,
) -> Result<ExitCode> {
    let (device_keys, vdev_keys) = (drivers.device_keys(), drivers.vdev_keys());
    let usage = || A::command().render_help().to_string();
    let program = Program { usage: Some(usage), device_keys: &device_keys, vdev_keys: &vdev_keys, peer_of };
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
    app.eal.open_telemetry();
    app.eal.open_handover();
    Ok(application(&app, own)?.report())
}

impl App {
    /// Opens the ports that the EAL arguments select: PCI functions by address, then virtual devices in
    /// command-line order. With `--takeover` or in a secondary process, attaches to those of the running program.
    ///
    /// # Errors
    /// The error of the first port that is unavailable; `Usage` when the ports cannot use the addresses of
    /// `--iova-mode`; `Busy` when the running program has others.
    pub fn open_ports(&self) -> Result<Vec<OpenPort>> {
        let (eal, drivers, bus) = (&self.eal, &self.drivers, Bus::default());
        let open = match eal.running() {
            None => ports::open(eal, drivers, &bus, &self.stop)?,
            Some(running) => {
                let offered = running.record::<ProgramRecord>()?.ports;
                ports::take_over(eal, drivers, &bus, &offered, &running.take_fds())?
            }
        };
        self.eal.iova_mode(open.iter().any(OpenPort::is_physical))?;
        Ok(open)
    }

    /// Distributes `ways`, each a source and a destination port, evenly over all lcores. Each port has
    /// `pairs` queue pairs. See [`assign_lcores`].
    ///
    /// # Errors
    /// `Unavailable` when `ways` is empty, because there are no ports.
    pub fn assign_lcores(&self, ways: &[(usize, usize)], pairs: u16) -> Result<Vec<Route>> {
        assign_lcores(ways, pairs, &self.eal.lcores.ids(), None, Processes::default())
    }

    /// Reserves memory for the ports of `routes` and their rings as the EAL arguments specify, and maps it.
    /// The other ports in `open` stay open and are not started.
    ///
    /// # Errors
    /// As for [`memory::reserve`]; `Usage` when a pool cannot have the requested number of buffers, or when processes
    /// cannot share a port.
    pub fn reserve(&self, open: Vec<OpenPort>, routes: Vec<Route>, config: &Config) -> Result<Ports> {
        let lcores = &self.eal.lcores;
        let used: Vec<&OpenPort> =
            Route::ports(&routes).into_iter().filter_map(|port| open.get(port)).collect();
        let nodes: BTreeSet<u32> = used.iter().filter_map(|open| open.node).collect();
        let mut need = config.need(used.len(), lcores.ids().len() * nodes.len().max(1));
        if let Some(primary) = self.eal.primary() {
            need.buffers = primary.record::<ProgramRecord>()?.buffers;
        }
        let memory = memory::reserve(&self.eal, &need, &used)?;
        let polled = routes.iter().filter(|route| config.processes.polls(route.process));
        let served = polled.flat_map(|route| [route.from, route.to].map(|port| (route.lcore, port)));
        memory::warn_of_distance(
            lcores,
            &memory,
            served.filter_map(|(lcore, port)| Some((lcore, open.get(port)?))),
        );
        let ports = Ports::new(open, routes, memory, &need)?.shared_by(config.processes)?;
        Ok(if self.eal.running().is_some() { ports.of_running() } else { ports })
    }

    /// Drops what only set-up needs: root privileges (`--user`), then, unless `--no-sandbox` is given, access
    /// to files and system calls. Call it once, after the ports have started and before the lcores do.
    ///
    /// # Errors
    /// As for [`Eal::confine`].
    pub fn confine(&self) -> Result<()> {
        ports::confine(&self.eal)
    }
}
