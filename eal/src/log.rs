//! Log on standard error: `EAL: message`, with DPDK's levels and type names.

use std::fmt;
use std::io::IsTerminal;
use std::path::PathBuf;
use std::str::FromStr;
use std::sync::LazyLock;

use tracing::{Event, Level, Metadata, Subscriber};
use tracing_subscriber::filter::{FilterFn, LevelFilter};
use tracing_subscriber::fmt::format::Writer;
use tracing_subscriber::fmt::{FmtContext, FormatEvent, FormatFields};
use tracing_subscriber::prelude::*;
use tracing_subscriber::registry::LookupSpan;

use crate::args::quoted;
use crate::error::{Error, ErrorKind, Result};

/// DPDK's level names; the first has number 1.
const NAMES: [&str; 8] = ["emergency", "alert", "critical", "error", "warning", "notice", "info", "debug"];

/// Crate of the application frame.
const FRAME: &str = "vireo_frame";

/// Level of types that no `--log-level` names: info.
const DEFAULT_LEVEL: u8 = 7;

/// Value of `--log-level`: `[TYPE:]LEVEL`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LogLevel {
    /// Pattern of the types that the level applies to, with `*` and `?`; all types if absent.
    pub pattern: Option<String>,
    /// DPDK's number: 1 (emergency) to 8 (debug).
    pub level: u8,
}

impl FromStr for LogLevel {
    type Err = Error;

    /// Parses `[TYPE:]LEVEL`. The level is a number, a name or the first letters of a name.
    fn from_str(text: &str) -> Result<Self> {
        let wrong = |why: &str| Error::new(ErrorKind::Usage, format!("--log-level {}", quoted(text)), why);
        if text.contains(',') {
            return Err(wrong("regular expressions are not supported")
                .with_hint("use TYPE:LEVEL with the wildcards * and ?"));
        }
        let (pattern, name) = match text.rsplit_once(':') {
            Some((pattern, name)) => (Some(pattern.to_owned()), name),
            None => (None, text),
        };
        let by_name = || NAMES.iter().position(|known| !name.is_empty() && known.starts_with(name));
        let number = name.parse().ok().or_else(|| by_name().map(|index| index as u8 + 1));
        match number.filter(|level| (1..=8).contains(level)) {
            Some(level) => Ok(Self { pattern, level }),
            None => Err(wrong("there is no such level")
                .with_hint(format!("use 1 to 8 or one of {}", NAMES.join(", ")))),
        }
    }
}

/// Text of `--log-level help`.
pub fn help() -> String {
    let names: String =
        NAMES.iter().enumerate().map(|(index, name)| format!("  {} {name}\n", index + 1)).collect();
    format!(
        "Levels (the first letters are enough):\n{names}\
         Types, by the first word of a log line:\n  \
           EAL      lib.eal, which includes lib.eal.vfio and lib.eal.iommufd\n  \
           PCI      bus.pci\n  \
           DRIVER   pmd.net.driver, such as pmd.net.virtio\n  \
           PROGRAM  user.program, such as user.l2fwd\n\
         A type includes those below it: --log-level lib.eal:debug --log-level 'pmd.*:warning'\n\
         If several match, the last one applies.\n"
    )
}

/// When to color the log (`--log-color`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum LogColor {
    /// On a terminal, unless `NO_COLOR` is set and not empty.
    #[default]
    Auto,
    /// Always.
    Always,
    /// Never.
    Never,
}

/// Starts the log of the process, on standard error. If the program already has a `tracing` subscriber or a
/// `log` logger, that one stays. `levels` and `color` then have no effect, which is logged.
pub fn init(levels: &[LogLevel], color: LogColor) {
    let colours = match color {
        LogColor::Auto => {
            std::io::stderr().is_terminal()
                && std::env::var_os("NO_COLOR").is_none_or(|value| value.is_empty())
        }
        color => color == LogColor::Always,
    };
    let most = levels.iter().map(|level| level.level).chain([DEFAULT_LEVEL]).max();
    let given = !levels.is_empty() || color != LogColor::Auto;
    let levels = levels.to_vec();
    let filter = FilterFn::new(move |metadata: &Metadata<'_>| enabled(&levels, metadata))
        .with_max_level_hint(LevelFilter::from_level(verbosity(most.unwrap_or(DEFAULT_LEVEL))));
    let layer = tracing_subscriber::fmt::layer()
        .with_writer(std::io::stderr)
        .with_ansi(colours)
        // The layer would report a failed write on standard error, which panics if that is a closed pipe.
        .log_internal_errors(false)
        .event_format(Line)
        .with_filter(filter);
    if tracing_subscriber::registry().with(layer).try_init().is_err() && given {
        tracing::warn!("--log-level and --log-color have no effect: the program has its own log");
    }
}

fn verbosity(level: u8) -> Level {
    match level {
        0..=4 => Level::ERROR,
        5 | 6 => Level::WARN,
        7 => Level::INFO,
        _ => Level::DEBUG,
    }
}

fn enabled(levels: &[LogLevel], metadata: &Metadata<'_>) -> bool {
    let name = log_type(metadata.target(), program());
    let holds = |level: &&LogLevel| level.pattern.as_ref().is_none_or(|pattern| covers(pattern, &name));
    let level = levels.iter().rev().find(holds).map_or(DEFAULT_LEVEL, |level| level.level);
    *metadata.level() <= verbosity(level)
}

/// Name under which the application frame logs: the program's file name without `vireo-`.
fn program() -> &'static str {
    static NAME: LazyLock<String> = LazyLock::new(|| {
        let path = std::env::args_os().next().map(PathBuf::from).unwrap_or_default();
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        name.strip_prefix("vireo-").unwrap_or(&name).to_owned()
    });
    &NAME
}

/// Returns the DPDK-like type of a module: `lib.eal.vfio` for `vireo_eal::vfio`, `user.PROGRAM` for an
/// application's frame.
fn log_type(target: &str, program: &str) -> String {
    if target.starts_with(FRAME) {
        return format!("user.{program}");
    }
    let dotted = target.replace("::", ".");
    let rest = dotted.strip_prefix("vireo_").unwrap_or(&dotted);
    let crates = [
        ("eal", "lib.eal"),
        ("iommufd", "lib.eal.iommufd"),
        ("vfio", "lib.eal.vfio"),
        ("bus_pci", "bus.pci"),
        ("drivers", "pmd.net"),
    ];
    for (krate, name) in crates {
        if let Some(module) = rest.strip_prefix(krate)
            && (module.is_empty() || module.starts_with('.'))
        {
            return format!("{name}{module}");
        }
    }
    format!("user.{rest}")
}

/// Returns whether `pattern` matches `name` or one of the types above it.
fn covers(pattern: &str, name: &str) -> bool {
    let above = name.match_indices('.').map(|(dot, _)| &name[..dot]);
    above.chain([name]).any(|name| glob(pattern.as_bytes(), name.as_bytes()))
}

/// Returns whether `pattern` matches all of `text`, in constant space and at most quadratic time.
fn glob(pattern: &[u8], text: &[u8]) -> bool {
    let (mut p, mut t) = (0, 0);
    let mut retry = None;
    while t < text.len() {
        if pattern.get(p) == Some(&b'*') {
            p += 1;
            retry = Some((p, t));
        } else if pattern.get(p).is_some_and(|byte| *byte == b'?' || *byte == text[t]) {
            (p, t) = (p + 1, t + 1);
        } else if let Some((after_star, from)) = retry {
            (p, t) = (after_star, from + 1);
            retry = Some((p, t));
        } else {
            return false;
        }
    }
    pattern[p..].iter().all(|byte| *byte == b'*')
}

/// Returns the component that logs a line, for the start of the line.
fn speaker(target: &str, program: &str) -> String {
    let mut parts = target.split("::");
    let krate = parts.next().unwrap_or_default();
    match krate {
        "vireo_iommufd" | "vireo_vfio" => "EAL".into(),
        "vireo_bus_pci" => "PCI".into(),
        "vireo_drivers" => parts.next().unwrap_or("net").to_uppercase(),
        FRAME => program.to_uppercase(),
        _ => krate.strip_prefix("vireo_").unwrap_or(krate).to_uppercase(),
    }
}

struct Line;

impl<S, N> FormatEvent<S, N> for Line
where
    S: Subscriber + for<'a> LookupSpan<'a>,
    N: for<'a> FormatFields<'a> + 'static,
{
    fn format_event(
        &self,
        ctx: &FmtContext<'_, S, N>,
        mut out: Writer<'_>,
        event: &Event<'_>,
    ) -> fmt::Result {
        write!(out, "{}: ", speaker(event.metadata().target(), program()))?;
        let (word, colour) = match *event.metadata().level() {
            Level::ERROR => ("error: ", "\x1b[1;31m"),
            Level::WARN => ("warning: ", "\x1b[33m"),
            Level::INFO => ("", ""),
            _ => ("debug: ", "\x1b[2m"),
        };
        if out.has_ansi_escapes() && !word.is_empty() {
            write!(out, "{colour}{word}\x1b[0m")?;
        } else {
            out.write_str(word)?;
        }
        ctx.format_fields(out.by_ref(), event)?;
        writeln!(out)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn levels_by_number_name_and_first_letters() {
        let all = |level| LogLevel { pattern: None, level };
        for (text, level) in [("8", 8), ("debug", 8), ("d", 8), ("emerg", 1), ("1", 1), ("warn", 5)] {
            assert_eq!(text.parse(), Ok(all(level)));
        }
        assert_eq!("lib.*:notice".parse(), Ok(LogLevel { pattern: Some("lib.*".into()), level: 6 }));
        for text in ["", "0", "9", "x", "lib.eal:", "lib.eal:-1", "lib.eal,8", "Debug", "999999999999"] {
            let error = text.parse::<LogLevel>().unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Usage, "{text}");
        }
    }

    #[test]
    fn modules_have_names_like_those_of_dpdk() {
        assert_eq!(log_type("vireo_eal::vfio::group", "x"), "lib.eal.vfio.group");
        assert_eq!(log_type("vireo_vfio::region", "x"), "lib.eal.vfio.region");
        assert_eq!(log_type("vireo_iommufd::mapping", "x"), "lib.eal.iommufd.mapping");
        assert_eq!(log_type("vireo_vfio_bench", "x"), "user.vfio_bench");
        assert_eq!(log_type("vireo_bus_pci", "x"), "bus.pci");
        assert_eq!(log_type("vireo_drivers::virtio", "x"), "pmd.net.virtio");
        assert_eq!(log_type("vireo_l2fwd", "x"), "user.l2fwd");
        assert_eq!(log_type("vireo_ealing", "x"), "user.ealing");
        assert_eq!([speaker("vireo_eal::vfio", "x"), speaker("vireo_iommufd::mapping", "x")], ["EAL", "EAL"]);
        assert_eq!(speaker("vireo_drivers::e1000::rx", "x"), "E1000");
        assert_eq!(speaker("vireo_l2fwd", "x"), "L2FWD");
        assert_eq!(log_type("vireo_frame::control", "l2fwd"), "user.l2fwd");
        assert_eq!(speaker("vireo_frame::control", "l2fwd"), "L2FWD");
    }

    /// The help does not list drivers, so a new driver needs no change to it.
    #[test]
    fn the_type_of_a_line_is_read_off_its_first_word() {
        let text = help();
        for (word, named, target) in [
            ("EAL", "lib.eal", "vireo_eal::init"),
            ("EAL", "lib.eal.vfio", "vireo_vfio::device"),
            ("EAL", "lib.eal.iommufd", "vireo_iommufd::ioas"),
            ("PCI", "bus.pci", "vireo_bus_pci::scan"),
            ("DRIVER", "pmd.net.driver", "vireo_drivers::driver"),
            ("PROGRAM", "user.program", "vireo_frame::control"),
        ] {
            assert_eq!(speaker(target, "program"), word);
            assert!(covers(named, &log_type(target, "program")), "{target}");
            let line = text.lines().find(|line| line.trim_start().starts_with(word)).unwrap();
            assert!(line.contains(named), "{line}");
        }
    }

    #[test]
    fn a_type_covers_those_below_it() {
        assert!(covers("lib.eal", "lib.eal.vfio"));
        assert!(covers("lib.*", "lib.eal"));
        assert!(covers("*.vfio", "lib.eal.vfio.group"));
        assert!(covers("pmd.net.e1???", "pmd.net.e1000"));
        assert!(!covers("lib.ea", "lib.eal"));
        assert!(!covers("", "lib.eal"));
    }

    proptest! {
        #[test]
        fn a_glob_without_wildcards_is_equality(a in "[ab.]{0,6}", b in "[ab.]{0,6}") {
            prop_assert_eq!(glob(a.as_bytes(), b.as_bytes()), a == b);
        }

        #[test]
        fn a_star_stands_for_anything(a in "[ab]{0,6}", b in "[ab]{0,6}", c in "[ab]{0,6}") {
            let pattern = format!("{a}*{c}");
            let text = format!("{a}{b}{c}");
            prop_assert!(glob(pattern.as_bytes(), text.as_bytes()));
        }

        #[test]
        fn no_text_panics(text: String) {
            let _ = text.parse::<LogLevel>();
        }
    }
}
