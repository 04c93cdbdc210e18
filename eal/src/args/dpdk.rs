//! EAL arguments of DPDK 26.11 (`lib/eal/common/eal_option_list.h`) that `cli.rs` does not implement: Vireo
//! accepts them without effect, or refuses them and names the alternative.

use clap::builder::NonEmptyStringValueParser;
use clap::parser::ValueSource;
use clap::{Arg, ArgAction, ArgMatches, Command, value_parser};

use self::Fate::{NoEffect, Refused};
use self::Value::{Flag, Number, Optional, Text};
use crate::error::{Error, ErrorKind, Result};

/// EAL argument of DPDK.
struct Argument {
    long: &'static str,
    short: Option<char>,
    value: Value,
    fate: Fate,
}

#[derive(Clone, Copy)]
enum Value {
    Flag,
    /// A number, at least 1.
    Number,
    Text,
    Optional,
}

#[derive(Clone, Copy)]
enum Fate {
    /// Accepted without effect, for this reason.
    NoEffect(&'static str),
    /// Refused, with this alternative. The value is not checked.
    Refused(&'static str),
}

const fn long(long: &'static str, value: Value, fate: Fate) -> Argument {
    Argument { long, short: None, value, fate }
}

const fn short(short: char, long: &'static str, value: Value, fate: Fate) -> Argument {
    Argument { long, short: Some(short), value, fate }
}

const DRIVERS: &str = "leave it out: drivers are built in";
const LCORES: &str = "leave it out, and give all cores with -l: there are no service cores";
const LIMIT: &str = "leave it out: Vireo reserves only what -m or --numa-mem requests";
const TRACE: &str = "leave it out, and use --log-level, or perf(1) on the program";
const CHANNELS: &str = "packet buffers are not spread over memory channels";

const ARGUMENTS: &[Argument] = &[
    long("auto-probing", Flag, NoEffect("it is the default")),
    long("base-virtaddr", Text, NoEffect("IOVAs depend on the IOMMU, not on virtual addresses")),
    long("create-uio-dev", Flag, Refused("use VFIO: vireo-devbind --bind vfio-pci ADDRESS")),
    short('d', "driver-path", Optional, Refused(DRIVERS)),
    long("force-max-simd-bitwidth", Number, NoEffect("no driver has vector code")),
    long("huge-worker-stack", Optional, Refused("leave it out: worker stacks are ordinary memory")),
    long("legacy-mem", Flag, NoEffect("all memory is reserved at start-up")),
    long("log-timestamp", Optional, Refused("pipe standard error into ts(1), or into systemd's journal")),
    long("match-allocations", Flag, NoEffect("memory is released as it was reserved")),
    long("mbuf-pool-ops-name", Text, NoEffect("there is only one kind of pool")),
    short('n', "memory-channels", Number, NoEffect(CHANNELS)),
    short('r', "memory-ranks", Number, NoEffect(CHANNELS)),
    long("no-hpet", Flag, NoEffect("the HPET is not used")),
    long("no-shconf", Flag, NoEffect("processes do not share configuration")),
    long("numa-limit", Optional, Refused(LIMIT)),
    long("pagesz-mem", Optional, Refused("use -m for the size, --huge-dir for the page size")),
    short('S', "service-corelist", Optional, Refused(LCORES)),
    short('s', "service-coremask", Optional, Refused(LCORES)),
    long("single-file-segments", Flag, NoEffect("memory is always a single file")),
    long("socket-limit", Optional, Refused(LIMIT)),
    long("syslog", Optional, NoEffect("the log goes to standard error; pipe it into logger(1)")),
    long("telemetry", Flag, NoEffect("it is the default")),
    long("trace", Optional, Refused(TRACE)),
    long("trace-bufsz", Optional, Refused(TRACE)),
    long("trace-dir", Optional, Refused(TRACE)),
    long("trace-mode", Optional, Refused(TRACE)),
    long("vmware-tsc-map", Flag, NoEffect("the TSC is read directly")),
];

/// Arguments that DPDK does not accept together, in addition to the conflicts in `cli.rs`.
const CONFLICTS: &[(&str, &[&str])] = &[
    ("auto-probing", &["no_auto_probing"]),
    ("legacy-mem", &["in_memory", "match-allocations"]),
    ("match-allocations", &["no_huge"]),
    ("single-file-segments", &["no_huge", "huge_unlink"]),
    ("telemetry", &["no_telemetry"]),
];

/// Adds the arguments to `command`, hidden from its help.
pub(super) fn add_to(command: Command) -> Command {
    command.args(ARGUMENTS.iter().map(|argument| {
        let arg = Arg::new(argument.long).long(argument.long).hide(true);
        let arg = argument.short.map_or(arg.clone(), |short| arg.short(short));
        let arg = match (argument.value, argument.fate) {
            (Flag, _) => arg.action(ArgAction::SetTrue),
            (Number, _) => arg.value_name("N").value_parser(value_parser!(u32).range(1..)),
            (Text, _) => arg.value_name("VALUE").value_parser(NonEmptyStringValueParser::new()),
            (Optional, NoEffect(_)) => arg.value_name("VALUE").num_args(0..=1).require_equals(true),
            (Optional, Refused(_)) => arg.value_name("VALUE").num_args(0..=1).action(ArgAction::Append),
        };
        let conflicts = CONFLICTS.iter().filter(|(long, _)| *long == argument.long);
        arg.conflicts_with_all(conflicts.flat_map(|(_, others)| *others))
    }))
}

/// Returns notes on the given arguments that have no effect.
///
/// # Errors
/// `Usage` for the first given argument that Vireo does not have.
pub(super) fn notes(matches: &ArgMatches) -> Result<Vec<String>> {
    let given = |argument: &&Argument| matches.value_source(argument.long) == Some(ValueSource::CommandLine);
    let note = |argument: &Argument| match argument.fate {
        NoEffect(why) => Ok(no_effect(&format!("--{}", argument.long), why)),
        Refused(hint) => Err(refusal(&format!("--{}", argument.long), hint)),
    };
    ARGUMENTS.iter().filter(given).map(note).collect()
}

/// Note on an argument that has no effect.
pub(super) fn no_effect(argument: &str, why: &str) -> String {
    format!("{argument} has no effect: {why}")
}

/// Error for a DPDK argument that Vireo does not have.
pub(super) fn refusal(argument: &str, hint: &str) -> Error {
    Error::new(ErrorKind::Usage, argument, "Vireo does not support this DPDK argument").with_hint(hint)
}

/// Lines of the help on DPDK's other arguments.
pub(super) fn help() -> String {
    let accepted = ARGUMENTS.iter().filter(|argument| matches!(argument.fate, NoEffect(_)));
    let name = |argument: &Argument| match argument.short {
        Some(short) => format!("-{short}"),
        None => format!("--{}", argument.long),
    };
    let names: Vec<String> = accepted.map(name).collect();
    format!(
        "Accepted without effect: {}\nOther DPDK arguments are refused with a hint at the alternative.",
        names.join(", ")
    )
}
