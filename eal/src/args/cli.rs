//! The command line as clap parses it. `mod.rs` converts it to plain values.

use std::ffi::OsString;
use std::path::PathBuf;
use std::str::FromStr;

use clap::error::{ContextKind, ContextValue, ErrorKind as ClapKind};
use clap::{ArgAction, CommandFactory, FromArgMatches, value_parser};

use super::{IovaMode, Program, VfToken, VfioInterrupt, dpdk};
use crate::bdf::Bdf;
use crate::error::{Error, ErrorKind, Result};
use crate::log::{LogColor, LogLevel};
use crate::user::UserName;
use crate::vfio::{FdSource, VfioMode};

/// EAL arguments: those before `--`.
#[derive(clap::Parser)]
#[command(disable_help_flag = true)]
pub(super) struct Cli {
    /// Cores to run on: 1-3,5 or 0@2 (lcore 0 on CPU 2) or (0,1)@(2-4); default: all CPUs the process may use
    #[arg(short, long, value_name = "LIST", conflicts_with = "coremask")]
    pub(super) lcores: Option<String>,
    /// Cores to run on as a hexadecimal mask; deprecated, use -l
    #[arg(short, long, value_name = "MASK")]
    pub(super) coremask: Option<String>,
    /// Lcore ID of the main thread; default: the lowest
    #[arg(long, value_name = "ID")]
    pub(super) main_lcore: Option<u32>,
    /// Renumber the lcores of -l from 0, or from ID, instead of using their CPU numbers
    #[arg(short = 'R', long, value_name = "ID", require_equals = true)]
    pub(super) remap_lcore_ids: Option<Option<u32>>,

    /// Use only this device, with device arguments such as vfio-mode=cdev; may be repeated
    #[arg(short, long, value_name = "BDF[,K=V]", conflicts_with_all = ["block", "no_pci"])]
    pub(super) allow: Vec<String>,
    /// Never use this device; may be repeated
    #[arg(short, long, value_name = "BDF", value_parser = Bdf::from_str)]
    pub(super) block: Vec<Bdf>,
    /// Use only devices named by -a or --vdev
    #[arg(short = 'A', long, conflicts_with = "block")]
    pub(super) no_auto_probing: bool,
    /// Create a virtual device, such as net_virtio_user0,path=/tmp/socket; may be repeated
    #[arg(long, value_name = "NAME[,K=V]")]
    pub(super) vdev: Vec<String>,
    /// Do not use the PCI bus
    #[arg(long)]
    pub(super) no_pci: bool,
    /// How to open VFIO devices: auto, container (or group), cdev, compat, noiommu, noiommu-cdev
    #[arg(long, value_name = "MODE", value_parser = VfioMode::from_str, default_value = "auto")]
    pub(super) vfio_mode: VfioMode,
    /// Give each port its own address space: it reaches only the packet buffers and its own rings
    #[arg(long)]
    pub(super) isolate_ports: bool,
    /// Addresses that devices use: physical (no-IOMMU modes) or virtual (other modes); default: as the VFIO
    /// mode needs
    #[arg(long, value_name = "MODE")]
    pub(super) iova_mode: Option<IovaMode>,
    /// Kind of interrupt, for programs that use interrupts; default: the best that NIC and driver support
    #[arg(long, value_name = "KIND")]
    pub(super) vfio_intr: Option<VfioInterrupt>,
    /// Token that virtual functions share with their physical function
    #[arg(long, value_name = "UUID", value_parser = VfToken::from_str)]
    pub(super) vfio_vf_token: Option<VfToken>,
    /// Use device nodes opened by a launcher: listen (LISTEN_FDS, from vireo-launch or systemd), or a socket
    #[arg(long, value_name = "listen|SOCKET", value_parser = FdSource::from_str)]
    pub(super) vfio_fds: Option<FdSource>,
    /// Drop root privileges to this user after set-up: a name or UID, and a group if not the user's own
    #[arg(long, value_name = "USER[:GROUP]", value_parser = UserName::from_str)]
    pub(super) user: Option<UserName>,
    /// Do not restrict system calls and files after set-up
    #[arg(long)]
    pub(super) no_sandbox: bool,
    /// Create no telemetry socket
    #[arg(long)]
    pub(super) no_telemetry: bool,

    /// Memory to reserve, in MiB
    #[arg(short, long, value_name = "MB", value_parser = value_parser!(u32).range(1..))]
    pub(super) memory_size: Option<u32>,
    /// Memory to reserve on each NUMA node, in MiB, such as 64,64
    #[arg(long, alias = "socket-mem", value_name = "MB[,MB]", value_parser = NodeMemory::from_str,
        conflicts_with_all = ["memory_size", "no_huge"])]
    pub(super) numa_mem: Option<NodeMemory>,
    /// Directory of the hugetlbfs mount to use; by default, none is needed
    #[arg(long, value_name = "DIR")]
    pub(super) huge_dir: Option<PathBuf>,
    /// Create nothing in the file system: private memory, no runtime directory, no telemetry socket
    #[arg(long)]
    pub(super) in_memory: bool,
    /// Use 4 KiB pages instead of hugepages
    #[arg(long)]
    pub(super) no_huge: bool,
    /// When to unlink hugepage files; they are always unlinked at once, so "never" is refused
    #[arg(long, require_equals = true, hide = true, conflicts_with_all = ["no_huge", "in_memory"])]
    pub(super) huge_unlink: Option<Option<HugeUnlink>>,

    /// Name of the runtime directory; programs that run at the same time need different names
    #[arg(long, value_name = "NAME", default_value = "rte")]
    pub(super) file_prefix: String,
    /// Process type: primary (the default), which owns the devices; secondary, which polls queues of the running
    /// primary with this --file-prefix and the same arguments; or auto: secondary if there is a primary
    #[arg(long, value_name = "TYPE", default_value = "primary", hide_default_value = true)]
    pub(super) proc_type: String,
    /// Continue in place of the running program with this --file-prefix and the same arguments: its devices are not
    /// reset, and packets wait in their rings
    #[arg(long, conflicts_with = "in_memory")]
    pub(super) takeover: bool,
    /// Log level by number or name, for all types or matching ones ("help" lists them); may be repeated
    #[arg(long, value_name = "[TYPE:]LEVEL", value_parser = LogArg::from_str)]
    pub(super) log_level: Vec<LogArg>,
    /// When to color the log; default: auto, which depends on the terminal and NO_COLOR
    #[arg(long, value_name = "WHEN", require_equals = true)]
    pub(super) log_color: Option<Option<LogColor>>,
    /// Show the version
    #[arg(short = 'v', long)]
    pub(super) version: bool,
    /// Show this help
    #[arg(short, long, action = ArgAction::HelpShort)]
    help: Option<bool>,
}

/// Result of parsing the arguments with clap.
pub(super) enum Read {
    /// The arguments, and notes on those that have no effect.
    Arguments(Box<Cli>, Vec<String>),
    Help(String),
}

/// Value of `--log-level`.
#[derive(Clone)]
pub(super) enum LogArg {
    Set(LogLevel),
    Help,
}

impl LogArg {
    pub(super) fn level(self) -> Option<LogLevel> {
        match self {
            Self::Set(level) => Some(level),
            Self::Help => None,
        }
    }
}

impl FromStr for LogArg {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        if text == "help" { Ok(Self::Help) } else { text.parse().map(Self::Set) }
    }
}

/// When hugepage files are unlinked (`--huge-unlink`).
#[derive(Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub(super) enum HugeUnlink {
    Existing,
    Always,
    Never,
}

/// MiB to reserve on each NUMA node (`--numa-mem`), and their sum.
#[derive(Clone)]
pub(super) struct NodeMemory {
    pub(super) nodes: Vec<u64>,
    pub(super) sum: u32,
}

impl FromStr for NodeMemory {
    type Err = &'static str;

    fn from_str(text: &str) -> std::result::Result<Self, Self::Err> {
        let nodes: Option<Vec<u64>> = text.split(',').map(|node| node.parse().ok()).collect();
        let wrong = "it is not a list of MiB per NUMA node, such as 64,64";
        let nodes = nodes.ok_or(wrong)?;
        let sum = nodes.iter().try_fold(0_u64, |sum, node| sum.checked_add(*node));
        let sum = sum.and_then(|sum| u32::try_from(sum).ok()).filter(|sum| *sum > 0).ok_or(wrong)?;
        Ok(Self { nodes, sum })
    }
}

impl Cli {
    /// Parses `argv`, which ends before the `--`.
    pub(super) fn read(argv: &[OsString], program: &Program<'_>) -> Result<Read> {
        let name = program_name(argv);
        let command = dpdk::add_to(Self::command())
            .no_binary_name(true)
            .about("EAL arguments")
            .override_usage(format!("{name} [EAL ARGUMENTS] -- [APPLICATION ARGUMENTS]"))
            .after_help(dpdk::help())
            .mut_arg("takeover", |takeover| takeover.hide(program.peer_of.is_none()))
            .mut_arg("proc_type", |proc_type| proc_type.hide(program.peer_of.is_none()));
        let matches = command.try_get_matches_from(argv.iter().skip(1));
        match matches.and_then(|matches| Ok((Self::from_arg_matches(&matches)?, matches))) {
            Ok((cli, matches)) => Ok(Read::Arguments(Box::new(cli), dpdk::notes(&matches)?)),
            Err(error) if error.kind() == ClapKind::DisplayHelp => {
                let usage = program.usage.map(|usage| format!("\n{}", usage()));
                Ok(Read::Help(error.render().to_string() + &usage.unwrap_or_default()))
            }
            Err(error) => Err(one_line(&error, "EAL arguments", &name)),
        }
    }
}

/// File name of `argv[0]`.
pub(super) fn program_name(argv: &[OsString]) -> String {
    let path = argv.first().map(PathBuf::from).unwrap_or_default();
    path.file_name().map_or_else(|| "vireo".into(), |name| name.to_string_lossy().into_owned())
}

/// What errors call the arguments of a program that takes no EAL arguments.
pub(super) const PLAIN: &str = "arguments";

/// Converts clap's multi-line message to a one-line error.
pub(super) fn one_line(error: &clap::Error, what: &str, program: &str) -> Error {
    use std::error::Error as _;
    if let Some(own) = error.source().and_then(|source| source.downcast_ref::<Error>()) {
        return own.clone();
    }
    let mut rendered = error.render().to_string();
    for kind in [ContextKind::InvalidArg, ContextKind::InvalidValue] {
        // The reason follows the word, so a long word must not push it out of the message.
        if let Some(ContextValue::String(word)) = error.get(kind)
            && word.len() > 60
        {
            rendered = rendered.replace(word, &super::printable(word, 60));
        }
    }
    let why = rendered
        .trim_start_matches("error: ")
        .lines()
        .map(str::trim)
        .take_while(|line| !line.starts_with("Usage:") && !line.starts_with("For more information"))
        .filter(|line| !line.is_empty() && !line.starts_with("tip:"))
        .collect::<Vec<_>>()
        .join(" ");
    let hint = match (error.get(ContextKind::SuggestedArg), error.kind()) {
        (Some(ContextValue::String(name)), _) => format!("did you mean {name}?"),
        (Some(ContextValue::Strings(names)), _) => format!("did you mean {}?", names.join(" or ")),
        (_, ClapKind::UnknownArgument) if what != PLAIN => {
            format!("EAL arguments go before --, application arguments after it; see: {program} --help")
        }
        _ => format!("see: {program} --help"),
    };
    Error::new(ErrorKind::Usage, what, super::printable(&why, 200)).with_hint(hint)
}
