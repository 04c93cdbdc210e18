//! `vireo-handover ADDRESS MODE`: opens a function in one process and takes it over in another, which opens
//! no device node.
#![forbid(unsafe_code)]

use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::process::{Command, ExitCode};

use vireo_bus_pci::{Bus, Function};
use vireo_eal::vfio::{DeviceFds, Vfio, VfioMode};
use vireo_eal::{Error, ErrorKind, Result};

/// Third argument of the process that takes over.
const TAKE: &str = "take";

fn run() -> Result<()> {
    let words: Vec<String> = std::env::args().skip(1).collect();
    let (address, mode, takes) = match &words[..] {
        [address, mode] => (address.parse()?, mode.parse::<VfioMode>()?, false),
        [address, mode, last] if last == TAKE => (address.parse()?, mode.parse()?, true),
        _ => {
            return Err(Error::new(ErrorKind::Usage, "cannot start", "the arguments are not ADDRESS MODE")
                .with_hint("for example: vireo-handover 0000:00:0c.0 cdev"));
        }
    };
    let bus = Bus::default();
    let vfio = Vfio::new(None);
    let io = |what: &'static str| move |error: std::io::Error| Error::io(what, &error);
    if takes {
        let socket = std::io::stdin().as_fd().try_clone_to_owned().map_err(io("cannot take the socket"))?;
        let fds = DeviceFds::receive(&UnixStream::from(socket))?;
        let device = bus.adopt(&bus.find(address)?, &vfio, mode, fds)?;
        device.set_command(false)?;
        let first = device.bar(0).or_else(|_| device.bar(4))?.read32(0);
        println!(
            "{} in mode {}: {}; first register {first:#x}",
            device.id(),
            device.report.mode,
            device.report.why
        );
        return Ok(());
    }
    let (here, there) = UnixStream::pair().map_err(io("cannot create a socket pair"))?;
    let (mode, fds) = vfio.open(&bus.device(address), mode)?;
    fds.send(&here)?;
    drop(fds);
    let program = std::env::current_exe().map_err(io("cannot find this program"))?;
    let status = Command::new(program)
        .args([&address.to_string(), mode.name(), TAKE])
        .stdin(OwnedFd::from(there))
        .status()
        .map_err(io("cannot start the other process"))?;
    match status.success() {
        true => Ok(()),
        false => Err(Error::new(ErrorKind::Protocol, "the other process failed", "its message is above")),
    }
}

fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("vireo-handover: {error}");
            error.kind().exit_code().into()
        }
    }
}
