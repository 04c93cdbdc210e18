//! `vireo-proc-info [EAL ARGUMENTS] -- --stats …`: what a running program counts, and what it has.
#![forbid(unsafe_code)]

mod show;

use std::process::ExitCode;

use clap::{CommandFactory, Parser};
use serde_json::{Value, json};
use vireo_eal::args::{self, Outcome, port_mask};
use vireo_eal::{Error, ErrorKind, Result, program};
use vireo_top::client::{Program, no_program, sockets};

const NAME: &str = "vireo-proc-info";

/// Shows counters, ports and memory of the running program of Vireo or DPDK with the EAL's --file-prefix.
#[derive(Debug, Parser)]
#[command(
    name = "vireo-proc-info",
    override_usage = "vireo-proc-info [EAL ARGUMENTS] -- [-p PORTMASK] --stats",
    about = "Of the EAL arguments, only --file-prefix has an effect",
    disable_help_flag = true
)]
struct Cli {
    /// Ports to show, hexadecimal: bit N is port N; default: all
    #[arg(short = 'p', value_name = "PORTMASK", value_parser = port_mask)]
    mask: Option<u64>,
    /// Show packets, bytes and errors of each port and queue
    #[arg(long)]
    stats: bool,
    /// Show all counters of each port
    #[arg(long)]
    xstats: bool,
    /// Show the counter of this name of each port
    #[arg(long, value_name = "NAME")]
    xstats_name: Option<String>,
    /// Show the device, link, queues and state of each port
    #[arg(long)]
    show_port: bool,
    /// Show the pool of packet buffers of this name, or all of them
    #[arg(long, value_name = "NAME", require_equals = true, num_args = 0..=1)]
    show_mempool: Option<Option<String>>,
    /// Show the ring of this name, or all of them (of DPDK's programs)
    #[arg(long, value_name = "NAME", require_equals = true, num_args = 0..=1)]
    show_ring: Option<Option<String>>,
    /// Show the memory that devices reach
    #[arg(short = 'm')]
    memory: bool,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
    #[arg(long, hide = true)]
    stats_reset: bool,
    #[arg(long, hide = true)]
    xstats_reset: bool,
}

impl Cli {
    /// Checks that there is something to show, and nothing to change.
    fn check(&self) -> Result<()> {
        let refused = |argument: &str, why: &str, hint: &str| {
            Err(Error::new(ErrorKind::Usage, format!("cannot use {argument}"), why).with_hint(hint))
        };
        let resets = [(self.stats_reset, "--stats-reset"), (self.xstats_reset, "--xstats-reset")];
        if let Some((_, argument)) = resets.iter().find(|(given, _)| *given) {
            let why = "counters belong to the program that counts, and other clients would miss packets";
            return refused(argument, why, "compare the counts of two times");
        }
        let shows = self.stats || self.xstats || self.show_port || self.memory;
        if shows || self.xstats_name.is_some() || self.show_mempool.is_some() || self.show_ring.is_some() {
            return Ok(());
        }
        refused(
            NAME,
            "no argument says what to show",
            "add -- --stats, --xstats, --show-port or --show-mempool",
        )
    }
}

fn main() -> ExitCode {
    program::exit_code(NAME, run())
}

fn run() -> Result<ExitCode> {
    let usage = || Cli::command().render_help().to_string();
    let known = args::Program { usage: Some(usage), peer_of: Some(NAME), ..args::Program::default() };
    let parsed = match args::parse(std::env::args_os(), &known)? {
        Outcome::Print(text) => {
            program::print(&text)?;
            return Ok(ExitCode::SUCCESS);
        }
        Outcome::Run(parsed) => parsed,
    };
    let cli: Cli = args::parse_app(parsed.app)?;
    cli.check()?;
    let prefix = Some(&*parsed.eal.file_prefix);
    let socket = sockets(prefix)?.into_iter().next().ok_or_else(|| no_program(prefix, NAME))?;
    let found = find(&Program::connect(&socket)?, &cli)?;
    program::print(&if cli.json { format!("{found}\n") } else { show::text(&found) })?;
    Ok(ExitCode::SUCCESS)
}

/// Asks `program` for what `cli` wants to see.
fn find(program: &Program, cli: &Cli) -> Result<Value> {
    let mut found = json!({ "pid": program.pid(), "version": program.version() });
    let ports = program.ask("/ethdev/list")?;
    let ports = ports.as_array().into_iter().flatten().filter_map(Value::as_u64);
    let wanted = ports.filter(|port| cli.mask.is_none_or(|mask| *port < 64 && mask >> port & 1 == 1));
    let ports = wanted.map(|port| of_port(program, cli, port)).collect::<Result<Vec<_>>>()?;
    if ports.is_empty() && cli.mask.is_some() {
        let why = "the program has none of these ports";
        return Err(Error::new(ErrorKind::Unavailable, "cannot use -p", why));
    }
    found["ports"] = ports.into();
    if let Some(wanted) = &cli.show_mempool {
        found["mempools"] = each(program, ["/mempool/list", "/mempool/info"], wanted.as_deref())?;
    }
    if let Some(wanted) = &cli.show_ring {
        found["rings"] = each(program, ["/ring/list", "/ring/info"], wanted.as_deref())?;
    }
    if cli.memory {
        found["memzones"] = each(program, ["/eal/memzone_list", "/eal/memzone_info"], None)?;
    }
    Ok(found)
}

/// What `cli` wants to see of a port.
fn of_port(program: &Program, cli: &Cli, port: u64) -> Result<Value> {
    let of = |endpoint: &str| program.ask(&format!("{endpoint},{port}"));
    let mut found = json!({ "port": port });
    if cli.stats {
        found["stats"] = of("/ethdev/stats")?;
    }
    if cli.xstats || cli.xstats_name.is_some() {
        let mut counters = of("/ethdev/xstats")?;
        if let (Some(name), Some(all)) = (&cli.xstats_name, counters.as_object_mut()) {
            all.retain(|known, _| known == name);
            if all.is_empty() {
                let what = format!("cannot show {} of port {port}", args::quoted(name));
                return Err(Error::new(ErrorKind::Usage, what, "there is no counter of that name")
                    .with_hint("list them: --xstats"));
            }
        }
        found["xstats"] = counters;
    }
    if cli.show_port {
        found["info"] = of("/ethdev/info")?;
        found["link"] = of("/ethdev/link_status")?;
        // Only Vireo's programs tell it.
        found["vfio"] = of("/vfio/info")?;
    }
    Ok(found)
}

/// Asks for the information on everything in a list, or on what has the `wanted` name.
fn each(program: &Program, [list, info]: [&str; 2], wanted: Option<&str>) -> Result<Value> {
    let names = program.ask(list)?;
    let names = names.as_array().into_iter().flatten();
    let mut names: Vec<_> =
        names.map(|name| name.as_str().map_or_else(|| name.to_string(), str::to_owned)).collect();
    if let Some(wanted) = wanted {
        if !names.iter().any(|name| name == wanted) {
            let what = format!("cannot show {}", args::quoted(wanted));
            let error = Error::new(ErrorKind::Usage, what, "the program has none of that name");
            return Err(error.with_hint("list them: leave out the name"));
        }
        names.retain(|name| name == wanted);
    }
    names.iter().map(|name| program.ask(&format!("{info},{name}"))).collect()
}
