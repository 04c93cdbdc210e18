//! EAL arguments: `PROGRAM EAL-ARGUMENTS -- APPLICATION-ARGUMENTS`, with DPDK's names and Vireo's own.

mod cli;
mod devargs;
mod dpdk;
mod lcores;
mod token;
mod vdev;

use std::ffi::OsString;
use std::fmt::Display;
use std::path::{Path, PathBuf};

pub use devargs::DeviceArgs;
pub use lcores::{LcoreSpec, MAX_CORES, allowed_cpus, core_siblings, ranges};
pub use token::VfToken;
pub use vdev::VdevArgs;

use self::cli::{Cli, HugeUnlink, LogArg, Read};
use crate::bdf::Bdf;
use crate::error::{Error, ErrorKind, Result};
use crate::log::{self, LogColor, LogLevel};
use crate::program;
use crate::user::UserName;
use crate::vfio::{FdSource, VfioMode};

/// What the EAL needs to know about the program whose arguments it parses.
#[derive(Clone, Copy, Debug, Default)]
pub struct Program<'a> {
    /// Returns help on the application's own arguments, to be printed after the help on EAL arguments. Called only for
    /// that, because rendering it takes two fifths of the instructions of a start up to its devices.
    pub usage: Option<fn() -> String>,
    /// Device arguments that the program's drivers accept, in addition to `vfio-mode`.
    pub device_keys: &'a [&'a str],
    /// Drivers of virtual devices (`--vdev`) in the program, with the keys that each accepts.
    pub vdev_keys: &'a [(&'a str, &'a [&'a str])],
    /// Name of the program whose ports this one can take over while that runs (`--takeover`), or share with it
    /// (`--proc-type secondary`): its own. `None` if it cannot.
    pub peer_of: Option<&'a str>,
}

/// What the arguments ask for.
#[derive(Clone, Debug)]
pub enum Outcome {
    /// Continue with these arguments.
    Run(Box<Parsed>),
    /// Print this text on standard output and exit with 0: help or version.
    Print(String),
}

/// Parsed and checked arguments.
#[derive(Clone, Debug)]
pub struct Parsed {
    /// EAL arguments.
    pub eal: EalArgs,
    /// Application arguments: `argv[0]` and everything after the first `--`.
    pub app: Vec<OsString>,
}

/// EAL arguments as plain values, free of conflicts.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EalArgs {
    /// Lcores in ascending order of id, at least one; default: one for each CPU of the process.
    pub lcores: Vec<LcoreSpec>,
    /// Id of the main thread's lcore, one of `lcores`; default: the lowest.
    pub main_lcore: u32,
    /// Devices to use exclusively. If empty, all devices that are not in `block`.
    pub allow: Vec<DeviceArgs>,
    /// Devices never to use.
    pub block: Vec<Bdf>,
    /// Virtual devices, in addition to those on the PCI bus.
    pub vdevs: Vec<VdevArgs>,
    /// Where packet memory comes from.
    pub memory: MemoryArgs,
    /// Name of the runtime directory.
    pub file_prefix: String,
    /// Kind of device addresses, if requested. It is compatible with the VFIO modes.
    pub iova_mode: Option<IovaMode>,
    /// Whether to leave the PCI bus unused.
    pub no_pci: bool,
    /// Name of the program whose ports this one can take over or share; `None` if it cannot.
    pub peer_of: Option<String>,
    /// Whether to take over the running program. Never true without a name of it.
    pub takeover: bool,
    /// Whether this process owns its devices. Never [`ProcType::Secondary`] without a name of the program that does.
    pub proc_type: ProcType,
    /// VFIO mode of devices that have no mode of their own.
    pub vfio_mode: VfioMode,
    /// Whether each port gets its own address space. Never true in a mode without an IOMMU.
    pub isolate_ports: bool,
    /// Kind of interrupt that devices use, if requested; by default, the best that device and driver support.
    pub vfio_intr: Option<VfioInterrupt>,
    /// Token of virtual functions.
    pub vf_token: Option<VfToken>,
    /// Source of opened device nodes, if this process does not open them itself.
    pub vfio_fds: Option<FdSource>,
    /// User to drop privileges to after set-up.
    pub user: Option<UserName>,
    /// Whether to leave system calls and files unrestricted after set-up.
    pub no_sandbox: bool,
    /// Whether to create no telemetry socket, for [`Eal::open_telemetry`](crate::Eal::open_telemetry).
    pub no_telemetry: bool,
    /// Log levels in the order given, for [`log::init`].
    pub log_levels: Vec<LogLevel>,
    /// When to color the log, for [`log::init`].
    pub log_color: LogColor,
    /// Messages to log as warnings once the log is initialized.
    pub warnings: Vec<String>,
    /// Messages to log at level info once the log is initialized.
    pub notes: Vec<String>,
}

/// Where packet memory comes from.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct MemoryArgs {
    /// Memory to reserve, in MiB. If absent, as much as the application needs.
    pub megabytes: Option<u32>,
    /// Memory to reserve on each NUMA node, in MiB, indexed by node (`--numa-mem`). The sum is `megabytes`.
    pub socket_mem: Vec<u64>,
    /// Hugetlbfs mount for hugepage files. Never set together with `in_memory` or `no_huge`.
    pub huge_dir: Option<PathBuf>,
    /// Whether to create nothing in the file system: no hugepage files, runtime directory or telemetry socket.
    pub in_memory: bool,
    /// Whether to use 4 KiB pages instead of hugepages.
    pub no_huge: bool,
}

/// Which process owns the devices (`--proc-type`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ProcType {
    /// This one.
    Primary,
    /// The running one.
    Secondary,
    /// The running one, or this one if none runs.
    Auto,
}

/// Kind of addresses that devices use (`--iova-mode`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum IovaMode {
    /// Physical addresses.
    Pa,
    /// Virtual addresses, which the IOMMU translates.
    Va,
}

/// Kind of interrupt (`--vfio-intr`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum VfioInterrupt {
    /// INTx.
    Legacy,
    /// MSI.
    Msi,
    /// MSI-X.
    Msix,
}

impl EalArgs {
    /// Returns the mode in which to open the device at `address`.
    pub fn mode_of(&self, address: Bdf) -> VfioMode {
        self.allow
            .iter()
            .find(|device| device.address == address)
            .map_or(self.vfio_mode, |device| self.mode(device))
    }

    /// Returns whether any device may be opened in `mode`.
    pub fn uses(&self, mode: VfioMode) -> bool {
        match self.allow[..] {
            [] => self.vfio_mode == mode,
            _ => self.allow.iter().any(|device| self.mode(device) == mode),
        }
    }

    fn mode(&self, device: &DeviceArgs) -> VfioMode {
        device.mode.unwrap_or(self.vfio_mode)
    }

    fn check_modes(&self) -> Result<()> {
        let modes = || self.allow.iter().map(|device| self.mode(device));
        let first = modes().next().unwrap_or(self.vfio_mode);
        if let Some(other) = modes().find(|mode| mode.has_iommu() != first.has_iommu()) {
            return Err(conflict(
                &format!("VFIO modes {first} and {other}"),
                "without an IOMMU, devices use physical addresses, and one packet pool cannot serve both kinds",
                "use modes with an IOMMU for all devices, or no-IOMMU modes for all",
            ));
        }
        match self.iova_mode {
            Some(IovaMode::Va) if !first.has_iommu() => Err(conflict(
                &format!("--iova-mode va with VFIO mode {first}"),
                "without an IOMMU, devices use physical addresses",
                "leave --iova-mode out",
            )),
            Some(IovaMode::Pa) if first.has_iommu() && !self.no_pci => Err(conflict(
                &format!("--iova-mode pa with VFIO mode {first}"),
                "behind an IOMMU, devices use virtual addresses",
                "leave --iova-mode out, or use --vfio-mode noiommu",
            )),
            _ if self.isolate_ports && !first.has_iommu() => Err(conflict(
                &format!("--isolate-ports with VFIO mode {first}"),
                "without an IOMMU, every device reaches all memory",
                "leave --isolate-ports out, or use a mode with an IOMMU",
            )),
            _ if self.memory.no_huge && !first.has_iommu() => Err(conflict(
                &format!("--no-huge with VFIO mode {first}"),
                "physical addresses need hugepages: 4 KiB pages are not contiguous and can move",
                "leave --no-huge out",
            )),
            _ => Ok(()),
        }
    }
}

/// Parses `argv`, which starts with `argv[0]`. EAL arguments end at the first `--`.
///
/// # Errors
/// `Usage`, naming the invalid word and what would be valid; `Os` if the affinity cannot be read.
pub fn parse(argv: impl IntoIterator<Item = OsString>, program: &Program<'_>) -> Result<Outcome> {
    parse_on(argv.into_iter().collect(), program, allowed_cpus)
}

/// Parses an application's own arguments as in [`Parsed::app`], with `argv[0]` first. The help on them is
/// part of the EAL's help, so `T` has no help flag.
///
/// # Errors
/// `Usage`, on one line.
pub fn parse_app<T: clap::Parser>(argv: Vec<OsString>) -> Result<T> {
    check_words("argument after --", &argv)?;
    let program = cli::program_name(&argv);
    T::try_parse_from(argv).map_err(|error| cli::one_line(&error, "arguments after --", &program))
}

/// Parses the arguments of a program that takes no EAL arguments, with `argv[0]` first. If they ask for help
/// or the version, prints it and returns `None`.
///
/// # Errors
/// `Usage`, on one line; `Io` if the output cannot be written.
pub fn parse_plain<T: clap::Parser>(argv: impl IntoIterator<Item = OsString>) -> Result<Option<T>> {
    match T::try_parse_from(argv) {
        Ok(arguments) => Ok(Some(arguments)),
        Err(error) if !error.use_stderr() => program::print(&error.render().to_string()).map(|()| None),
        Err(error) => Err(cli::one_line(&error, cli::PLAIN, T::command().get_name())),
    }
}

fn parse_on(
    mut argv: Vec<OsString>,
    program: &Program<'_>,
    cpus: impl FnOnce() -> Result<Vec<usize>>,
) -> Result<Outcome> {
    let end = argv.iter().position(|word| word == "--");
    let after = argv.split_off(end.unwrap_or(argv.len()));
    check_words("EAL argument", &argv)?;
    let (cli, notes) = match Cli::read(&argv, program)? {
        Read::Arguments(cli, notes) => (*cli, notes),
        Read::Help(text) => return Ok(Outcome::Print(text)),
    };
    if cli.log_level.iter().any(|level| matches!(level, LogArg::Help)) {
        return Ok(Outcome::Print(log::help()));
    }
    let version = format!("{} (Vireo {})", cli::program_name(&argv), env!("CARGO_PKG_VERSION"));
    if cli.version && end.is_none() {
        return Ok(Outcome::Print(version + "\n"));
    }
    let show_version = cli.version;
    let mut eal = resolve(cli, notes, program, &cpus()?)?;
    if show_version {
        eal.notes.insert(0, version);
    }
    let app = argv.into_iter().take(1).chain(after.into_iter().skip(1)).collect();
    Ok(Outcome::Run(Box::new(Parsed { eal, app })))
}

fn check_words(kind: &str, argv: &[OsString]) -> Result<()> {
    match argv.iter().skip(1).find(|word| word.to_str().is_none()) {
        Some(word) => {
            let what = format!("{kind} {}", quoted(&word.to_string_lossy()));
            Err(Error::new(ErrorKind::Usage, what, "not valid UTF-8"))
        }
        None => Ok(()),
    }
}

fn resolve(cli: Cli, mut notes: Vec<String>, program: &Program<'_>, cpus: &[usize]) -> Result<EalArgs> {
    let mut warnings = Vec::new();
    let mut lcores = match (&cli.lcores, &cli.coremask) {
        (Some(list), _) => lcores::parse_list(list, cpus)?,
        (None, Some(mask)) => {
            let specs = lcores::parse_mask(mask, cpus)?;
            warnings.push(format!("--coremask is deprecated; use -l {}", ids(&specs)));
            specs
        }
        (None, None) => cpus.iter().map(|cpu| LcoreSpec { id: *cpu as u32, cpus: vec![*cpu] }).collect(),
    };
    if cli.lcores.is_some() || cli.coremask.is_some() {
        warnings.extend(lcores::shared_core(&lcores, Path::new("/sys")));
    }
    if let Some(first) = cli.remap_lcore_ids {
        lcores::remap(&mut lcores, first.unwrap_or(0))?;
    }
    let main_lcore = main_lcore(cli.main_lcore, &lcores)?;
    let proc_type = proc_type(&cli, program)?;

    let huge_dir = match cli.huge_dir {
        Some(dir) if dir.as_os_str().is_empty() => {
            return Err(Error::new(ErrorKind::Usage, "--huge-dir \"\"", "the directory is missing"));
        }
        Some(_) if cli.no_huge || cli.in_memory => {
            let other = if cli.no_huge { "--no-huge" } else { "--in-memory" };
            notes.push(format!("--huge-dir has no effect with {other}"));
            None
        }
        dir => dir,
    };
    match cli.huge_unlink {
        Some(Some(HugeUnlink::Never)) => {
            let hint = "leave it out: no hugepage file stays behind";
            return Err(dpdk::refusal("--huge-unlink=never", hint));
        }
        Some(_) => {
            notes.push(dpdk::no_effect("--huge-unlink", "files are unlinked as soon as they are open"))
        }
        None => {}
    }
    let devices = cli.allow.iter().map(|text| DeviceArgs::parse(text, program.device_keys));
    let vdevs = cli.vdev.iter().map(|text| VdevArgs::parse(text, program.vdev_keys));
    let eal = EalArgs {
        lcores,
        main_lcore,
        allow: devices.collect::<Result<_>>()?,
        block: cli.block,
        vdevs: vdevs.collect::<Result<_>>()?,
        memory: MemoryArgs {
            megabytes: cli.memory_size.or(cli.numa_mem.as_ref().map(|memory| memory.sum)),
            socket_mem: cli.numa_mem.map(|memory| memory.nodes).unwrap_or_default(),
            huge_dir,
            in_memory: cli.in_memory,
            no_huge: cli.no_huge,
        },
        file_prefix: file_prefix(cli.file_prefix)?,
        iova_mode: cli.iova_mode,
        no_pci: cli.no_pci || (cli.no_auto_probing && cli.allow.is_empty()),
        peer_of: program.peer_of.map(str::to_owned),
        takeover: cli.takeover,
        proc_type,
        vfio_mode: cli.vfio_mode,
        isolate_ports: cli.isolate_ports,
        vfio_intr: cli.vfio_intr,
        vf_token: cli.vfio_vf_token,
        vfio_fds: cli.vfio_fds,
        user: cli.user,
        no_sandbox: cli.no_sandbox,
        no_telemetry: cli.no_telemetry,
        log_levels: cli.log_level.into_iter().filter_map(LogArg::level).collect(),
        log_color: cli.log_color.flatten().unwrap_or_default(),
        warnings,
        notes,
    };
    check_twice("--allow", eal.allow.iter().map(|device| &device.address))?;
    check_twice("--block", eal.block.iter())?;
    check_twice("--vdev", eal.vdevs.iter().map(|vdev| &vdev.name))?;
    eal.check_modes()?;
    Ok(eal)
}

fn ids(specs: &[LcoreSpec]) -> String {
    ranges(&specs.iter().map(|spec| spec.id as usize).collect::<Vec<_>>())
}

fn main_lcore(asked: Option<u32>, lcores: &[LcoreSpec]) -> Result<u32> {
    let found = lcores.iter().map(|spec| spec.id).find(|id| asked.is_none_or(|asked| asked == *id));
    found.ok_or_else(|| {
        let what = format!("--main-lcore {}", asked.unwrap_or_default());
        Error::new(ErrorKind::Usage, what, "not one of the lcores")
            .with_hint(format!("use one of {}", ids(lcores)))
    })
}

fn file_prefix(name: String) -> Result<String> {
    // The prefix names a directory, whose path is part of the paths of sockets.
    let odd = name.contains('/') || name.contains(char::is_control);
    if (1..=64).contains(&name.len()) && name != "." && name != ".." && !odd {
        return Ok(name);
    }
    Err(conflict(
        &format!("--file-prefix {}", quoted(&name)),
        "not a file name of 1 to 64 bytes without control characters",
        "use a name such as vireo1",
    ))
}

/// Returns the process type, which must fit `program` and the other arguments.
fn proc_type(cli: &Cli, program: &Program<'_>) -> Result<ProcType> {
    if cli.takeover && program.peer_of.is_none() {
        return Err(conflict("--takeover", "this program cannot take over another one", "leave it out"));
    }
    const ONE: &str = "leave one of them out";
    let can_share = program.peer_of.is_some();
    let (with, why, hint) = match cli.proc_type.as_str() {
        "primary" => return Ok(ProcType::Primary),
        "auto" if cli.takeover || cli.in_memory || !can_share => return Ok(ProcType::Primary),
        "auto" => return Ok(ProcType::Auto),
        "secondary" if !can_share => ("", "this program cannot share its ports", "use primary or auto"),
        "secondary" if cli.takeover => {
            (" with --takeover", "a process shares the ports of another one or takes them over", ONE)
        }
        "secondary" if cli.in_memory => {
            (" with --in-memory", "processes find each other in the runtime directory", ONE)
        }
        "secondary" => return Ok(ProcType::Secondary),
        _ if can_share => ("", "there is no such type", "use primary, secondary or auto"),
        _ => ("", "there is no such type", "use primary or auto"),
    };
    let what = format!("--proc-type {}{with}", quoted(&cli.proc_type));
    Err(conflict(&what, why, hint))
}

fn check_twice<'a, T: Ord + Display + 'a>(
    argument: &str,
    devices: impl Iterator<Item = &'a T>,
) -> Result<()> {
    let mut seen = std::collections::BTreeSet::new();
    for device in devices {
        if !seen.insert(device) {
            let what = format!("{argument} {device}");
            return Err(Error::new(ErrorKind::Usage, what, "the device is given twice"));
        }
    }
    Ok(())
}

fn conflict(what: &str, why: &str, hint: &str) -> Error {
    Error::new(ErrorKind::Usage, what, why).with_hint(hint)
}

/// Parses a port mask (`-p` of DPDK's programs): hexadecimal, with or without `0x`; bit N is port N.
///
/// # Errors
/// What is wrong with the value.
pub fn port_mask(text: &str) -> std::result::Result<u64, String> {
    let digits = text.strip_prefix("0x").or_else(|| text.strip_prefix("0X")).unwrap_or(text);
    u64::from_str_radix(digits, 16).map_err(|_| "it is not a hexadecimal mask such as 0x3".into())
}

/// Formats `text` for an error message: in quotes, on one line, and cut after 60 characters.
pub fn quoted(text: &str) -> String {
    format!("\"{}\"", printable(text, 60))
}

fn printable(text: &str, max_chars: usize) -> String {
    let escape = |char: char| match char.is_control() {
        true => char.escape_default().to_string(),
        false => char.to_string(),
    };
    let more = if text.chars().nth(max_chars).is_some() { "…" } else { "" };
    text.chars().take(max_chars).map(escape).chain([more.to_owned()]).collect()
}

#[cfg(test)]
mod tests;
