//! `vireo-launch --user USER [--socket PATH] PROGRAM [EAL ARGUMENTS] -- …`: opens, as root, the device nodes
//! that the program's own arguments select, and starts the program with them as an ordinary user.
#![forbid(unsafe_code)]

use std::collections::BTreeSet;
use std::ffi::OsString;
use std::fs::Permissions;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{PermissionsExt, chown};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::str::FromStr;

use clap::Parser;
use nix::sys::socket::{getsockopt, sockopt::PeerCredentials};
use vireo_bus_pci::Bus;
use vireo_drivers::table::Drivers;
use vireo_eal::args::{self as eal_args, EalArgs, Outcome, Program};
use vireo_eal::user::{User, UserName, exec};
use vireo_eal::vfio::{FdSource, Vfio, device_nodes};
use vireo_eal::{Error, ErrorKind, Result, program, socket};

/// Starts a Vireo program as an ordinary user, with the device nodes that it needs.
///
/// Reads -a, -b, --vfio-mode and vfio-mode= from the program's arguments, opens the nodes that they select
/// and adds --vfio-fds=listen. The program may lock any amount of memory.
#[derive(Debug, Parser)]
#[command(name = "vireo-launch", version)]
struct Cli {
    /// User that runs the program: a name or UID, and a group if it is not the user's own
    #[arg(long, value_name = "USER[:GROUP]", value_parser = UserName::from_str)]
    user: UserName,
    /// Start no program: pass the nodes to the first process of USER that connects to PATH (--vfio-fds=PATH)
    #[arg(long, value_name = "PATH")]
    socket: Option<PathBuf>,
    /// The program and its arguments
    #[arg(
        required = true,
        trailing_var_arg = true,
        allow_hyphen_values = true,
        value_name = "PROGRAM [ARGUMENTS]"
    )]
    command: Vec<OsString>,
}

fn run() -> Result<ExitCode> {
    let Some(cli) = eal_args::parse_plain::<Cli>(std::env::args_os())? else { return Ok(ExitCode::SUCCESS) };
    if let Some(path) = &cli.socket {
        let argument = format!("--socket {}", eal_args::quoted(&path.to_string_lossy()));
        socket::check_path(argument, path)?;
    }
    let user = cli.user.find()?;
    let drivers = Drivers::default();
    let (device_keys, vdev_keys) = (drivers.device_keys(), drivers.vdev_keys());
    let program = Program { device_keys: &device_keys, vdev_keys: &vdev_keys, ..Program::default() };
    let parsed = match eal_args::parse(cli.command.iter().cloned(), &program)? {
        Outcome::Run(parsed) => parsed,
        Outcome::Print(text) => {
            program::print(&text)?;
            return Ok(ExitCode::SUCCESS);
        }
    };
    let fds = open(&parsed.eal, &drivers)?;
    if let Some(path) = &cli.socket {
        return serve(path, user, &fds);
    }
    let [name, rest @ ..] = &cli.command[..] else {
        return Err(Error::new(ErrorKind::Usage, "arguments", "the program is missing"));
    };
    let mut words = vec!["--vfio-fds=listen".into()];
    words.extend_from_slice(rest);
    Err(exec(name, &words, user, fds))
}

/// Opens the device nodes that the program would open if it were permitted to.
fn open(eal: &EalArgs, drivers: &Drivers) -> Result<Vec<OwnedFd>> {
    if matches!(eal.vfio_fds, Some(FdSource::Listen)) {
        return Err(Error::new(ErrorKind::Usage, "--vfio-fds=listen", "vireo-launch adds it")
            .with_hint("leave it out"));
    }
    let (bus, vfio) = (Bus::default(), Vfio::new(None));
    // One container or iommufd per mode, or with --isolate-ports per device. A group's node can be open only
    // once.
    let (mut shared, mut own) = (BTreeSet::new(), BTreeSet::new());
    for info in bus.select(eal, |id| drivers.driver_of(id).is_some())? {
        let mode = eal.mode_of(info.address);
        if !mode.has_iommu() {
            return Err(Error::new(
                ErrorKind::Permission,
                format!("cannot pass on {} in mode {mode}", info.address),
                "without an IOMMU, the program itself needs CAP_SYS_RAWIO",
            )
            .with_hint("start the program itself as root, with --user"));
        }
        let [first, second] = vfio.paths(&bus.device(info.address), mode)?;
        shared.insert((mode, eal.isolate_ports.then(|| second.clone()), first));
        own.insert(second);
    }
    if own.is_empty() {
        return Err(Error::new(
            ErrorKind::Unavailable,
            "cannot pass on device nodes",
            "the arguments select no device",
        )
        .with_hint("select one with -a; to list the bound devices, run: vireo-devbind"));
    }
    device_nodes::open_all(shared.iter().map(|(.., path)| path).chain(&own).map(PathBuf::as_path))
}

/// Passes `fds` to the first process of `user` that connects to `path`.
fn serve(path: &Path, user: User, fds: &[OwnedFd]) -> Result<ExitCode> {
    let failed = |error: std::io::Error| Error::io(format!("cannot listen at {}", path.display()), &error);
    let listener = UnixListener::bind(path).map_err(failed)?;
    let served = (|| {
        std::fs::set_permissions(path, Permissions::from_mode(0o600)).map_err(failed)?;
        chown(path, Some(user.uid()), Some(user.gid())).map_err(failed)?;
        loop {
            let (stream, _) = listener.accept().map_err(failed)?;
            let peer = getsockopt(&stream, PeerCredentials)
                .map_err(|errno| Error::os("cannot identify the peer", errno))?;
            if peer.uid() == user.uid() {
                return device_nodes::send(fds, &stream);
            }
        }
    })();
    let _ = std::fs::remove_file(path);
    served.map(|()| ExitCode::SUCCESS)
}

fn main() -> ExitCode {
    program::exit_code("vireo-launch", run())
}
