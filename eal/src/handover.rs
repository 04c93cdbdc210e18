//! Ports that pass between processes: to a successor, which takes over a running program, or to a secondary process,
//! which polls some of a primary's queues. This module has the socket, the messages and the descriptors.
//!
//! ```text
//! successor                              predecessor
//! Hello: program, role ────────────────> checks it
//!                         <───────────── Offer: descriptors, and what does not change while lcores forward
//! maps memory, prepares its ports
//! Ready ───────────────────────────────> takes all queues from the lcores
//!                         <───────────── State: queues, counters
//! continues the queues
//! Running ─────────────────────────────> ends without touching a device
//! polls
//! ```
//!
//! `Running` decides: the successor touches no device before it has sent that, and the predecessor none after it has
//! read that. If the connection ends earlier, or the predecessor [closes](Channel::close) it because it waited too
//! long, the predecessor continues.
//!
//! A secondary process begins in the same way. What follows the offer is up to the program, and so is what the messages
//! contain. `vireo-frame` uses this module for all applications. Each record says which parts of which types it has, so
//! programs of different versions understand each other, or refuse.

mod channel;

pub use channel::{Channel, Fds, ReceivedFds, decode, encode};

use std::os::fd::{AsFd, BorrowedFd, FromRawFd, OwnedFd};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use nix::errno::Errno;
use nix::libc;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::unistd::{Uid, geteuid};
use postcard_schema::Schema;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::dma::BUFFER_SIZE;
use crate::error::{Error, ErrorKind, Result};
use crate::mem::Region;
use crate::socket;
use crate::telemetry::TelemetrySocket;
use channel::{CANNOT, PATIENCE};

/// Name of the socket in the runtime directory.
pub(crate) const SOCKET: &str = "takeover";
/// How long the running program may take to answer the first message. It looks for other processes ten times per second,
/// but may be restarting a port.
const OFFER_PATIENCE: Duration = Duration::from_secs(10);

/// What a process wants from the running program.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, Schema)]
pub enum Role {
    /// To continue in its place (`--takeover`).
    Successor,
    /// To poll some of its queues (`--proc-type secondary`).
    Secondary,
}

/// First message, to the running program.
#[derive(Debug, Serialize, Deserialize, Schema)]
struct Hello {
    /// Name of the program.
    program: String,
    role: Role,
    /// The process itself (`pidfd_open(2)`), if the kernel offers that: the number of a descriptor.
    process: Option<u32>,
}

/// A process that asks for ports of this program.
#[derive(Debug)]
pub struct Peer {
    /// Connection to the process.
    pub channel: Channel,
    /// Process id.
    pub pid: u32,
    /// What the process wants.
    pub role: Role,
    /// The process itself, if the kernel offers that.
    process: Option<OwnedFd>,
}

impl Peer {
    /// Waits until the process, which has closed its connection, has ended, for at most `longest`. Returns whether it has.
    /// If the kernel cannot tell, the end of the connection counts.
    pub fn has_ended(&self, longest: Duration) -> bool {
        self.process.as_ref().is_none_or(|process| has_ended(process, longest))
    }
}

/// Later messages from the successor.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, Schema)]
pub enum Step {
    /// The successor is ready to continue the queues.
    Ready,
    /// The successor has everything and begins to poll.
    Running,
}

/// Socket at which a running program waits for its successor and for secondary processes.
#[derive(Debug)]
pub struct Listener {
    socket: UnixListener,
    program: String,
    /// This process, for a successor to see whether it has ended. The sandbox does not let a process open that.
    process: Option<OwnedFd>,
    /// The latest connection whose first message has not arrived yet.
    silent: Mutex<Option<Channel>>,
}

impl Listener {
    /// Creates the socket of `program` in its runtime directory.
    pub(crate) fn in_dir(directory: &Path, program: &str) -> Result<Self> {
        let path = directory.join(SOCKET);
        let what = || format!("cannot create the socket {}", path.display());
        // One that a killed process left behind.
        let _ = std::fs::remove_file(&path);
        let socket = UnixListener::bind(&path).map_err(|error| Error::io(what(), &error))?;
        Self::of(socket, program)
    }

    fn of(socket: UnixListener, program: &str) -> Result<Self> {
        let nonblocking = socket.set_nonblocking(true);
        nonblocking.map_err(|error| Error::io("cannot wait for other processes", &error))?;
        let process = own_pidfd();
        Ok(Self { socket, program: program.to_owned(), process, silent: Mutex::default() })
    }

    /// Accepts a process that has introduced itself, if there is one. A process of another user, or of another program,
    /// is refused. Does not wait.
    ///
    /// # Errors
    /// `Os` if a connection cannot be accepted.
    pub fn accept(&self) -> Result<Option<Peer>> {
        let what = "cannot accept another process";
        // No panic leaves it half-changed.
        let mut silent = self.silent.lock().unwrap_or_else(PoisonError::into_inner);
        match self.socket.accept() {
            Ok((socket, _)) => {
                *silent = Some(Channel::new(socket).map_err(|error| Error::io(what, &error))?);
            }
            Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {}
            Err(error) => return Err(Error::io(what, &error)),
        }
        let has_message = |channel: &mut Channel| channel.has_message(Duration::ZERO).unwrap_or(false);
        let Some(channel) = silent.take_if(has_message) else { return Ok(None) };
        let peer = channel.peer().map_err(|errno| Error::os(what, errno))?;
        let user = Uid::from_raw(peer.uid());
        let own = geteuid();
        let why = if user != own && !user.is_root() {
            format!("it belongs to uid {own}, but this to uid {user}")
        } else {
            match channel.receive::<Hello>(PATIENCE) {
                Ok((hello, fds)) if hello.program == self.program => {
                    let process = hello.process.and_then(|number| fds.get(number).ok());
                    return Ok(Some(Peer {
                        channel,
                        pid: peer.pid().unsigned_abs(),
                        role: hello.role,
                        process,
                    }));
                }
                Ok((hello, _)) => format!("it is {}, but this is {}", self.program, hello.program),
                Err(error) => error.why().to_owned(),
            }
        };
        // One that does not listen is refused all the same.
        let _ = channel.refuse(why);
        Ok(None)
    }

    /// Descriptor of this process that can be read when it has ended.
    pub(crate) fn process(&self) -> Option<BorrowedFd<'_>> {
        self.process.as_ref().map(AsFd::as_fd)
    }
}

impl AsFd for Listener {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

/// What the EAL of a running program passes to another process: numbers of descriptors.
#[derive(Clone, Debug, Serialize, Deserialize, Schema)]
pub(crate) struct EalRecord {
    /// Process id of the program.
    pub(crate) pid: u32,
    /// The process itself (`pidfd_open(2)`), if the kernel offers that.
    pub(crate) process: Option<u32>,
    /// Lock of the runtime directory.
    pub(crate) lock: u32,
    /// Socket at which the program waits for other processes.
    pub(crate) listener: u32,
    /// Telemetry socket and its path.
    pub(crate) telemetry: Option<(u32, PathBuf)>,
    /// Files of the regions of packet memory.
    pub(crate) regions: Vec<u32>,
    /// Size in bytes of a packet buffer.
    pub(crate) buffer_size: u32,
}

/// What a running program passes to another process in advance.
#[derive(Debug, Serialize, Deserialize, Schema)]
pub struct Offer {
    pub(crate) eal: EalRecord,
    /// Record of the layers above the EAL.
    pub(crate) program: Vec<u8>,
}

/// The program whose ports this process takes over or shares.
#[derive(Debug)]
pub struct RunningProgram {
    channel: Channel,
    role: Role,
    /// The running process; `None` if the kernel does not offer it.
    process: Option<OwnedFd>,
    pub(crate) offer: Offer,
    /// Descriptors that came with the offer, until they are taken.
    fds: Mutex<ReceivedFds>,
    /// Files of all regions, in order, until they are taken.
    regions: Mutex<Option<Vec<OwnedFd>>>,
}

impl RunningProgram {
    /// Asks the program that listens in `directory` for its offer.
    pub(crate) fn find(directory: &Path, program: &str, role: Role) -> Result<Self> {
        let argument = match role {
            Role::Successor => "--takeover",
            Role::Secondary => "--proc-type secondary",
        };
        let hint = format!("start {program} without {argument} if none runs");
        let socket = socket::connect(&directory.join(SOCKET), CANNOT, hint)?;
        let channel = Channel::new(socket).map_err(|error| Error::io(CANNOT, &error))?;
        let (process, mut fds) = (own_pidfd(), Fds::default());
        let process = process.as_ref().map(|process| fds.add(process.as_fd()));
        channel.send(&Hello { program: program.to_owned(), role, process }, &fds)?;
        let (offer, fds) = channel.answer::<Offer>(OFFER_PATIENCE)?;
        if offer.eal.buffer_size as usize != BUFFER_SIZE {
            let why =
                format!("its packet buffers have {} bytes, and not {BUFFER_SIZE}", offer.eal.buffer_size);
            return Err(Error::new(ErrorKind::Busy, CANNOT, why));
        }
        let regions = offer.eal.regions.iter().map(|number| fds.get(*number)).collect::<Result<_>>()?;
        let process = offer.eal.process.map(|number| fds.get(number)).transpose()?;
        let (fds, regions) = (Mutex::new(fds), Mutex::new(Some(regions)));
        Ok(Self { channel, role, process, offer, fds, regions })
    }

    /// Connection to the running program.
    pub fn channel(&self) -> &Channel {
        &self.channel
    }

    /// What this process wants from the running program.
    pub fn role(&self) -> Role {
        self.role
    }

    /// Process id of the running program.
    pub fn pid(&self) -> u32 {
        self.offer.eal.pid
    }

    /// Waits until the running process has ended and closed its files, for at most `longest`. Returns whether it has.
    pub fn has_ended(&self, longest: Duration) -> bool {
        self.process.as_ref().is_some_and(|process| has_ended(process, longest))
    }

    /// Takes the descriptors that came with the offer. Those that are not used are to be closed: a device that is open
    /// twice would stay open when its port is closed.
    pub fn take_fds(&self) -> ReceivedFds {
        std::mem::take(&mut *self.fds())
    }

    fn fds(&self) -> MutexGuard<'_, ReceivedFds> {
        self.fds.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Lock of the runtime directory.
    pub(crate) fn lock(&self) -> Result<OwnedFd> {
        self.fds().get(self.offer.eal.lock)
    }

    /// Record of the layers above the EAL.
    ///
    /// # Errors
    /// As for [`decode`].
    pub fn record<T: DeserializeOwned + Schema>(&self) -> Result<T> {
        decode(&self.offer.program)
    }

    /// Telemetry socket of the running program, if it has one.
    pub(crate) fn telemetry(&self) -> Result<Option<TelemetrySocket>> {
        let Some((number, path)) = &self.offer.eal.telemetry else { return Ok(None) };
        TelemetrySocket::of_predecessor(self.fds().get(*number)?, path.clone()).map(Some)
    }

    /// Socket at which the running program waits for successors of `program`.
    pub(crate) fn listener(&self, program: &str) -> Result<Listener> {
        Listener::of(self.fds().get(self.offer.eal.listener)?.into(), program)
    }

    /// Takes the files of all regions; `None` if that was done before.
    pub(crate) fn take_regions(&self) -> Option<Vec<OwnedFd>> {
        self.regions.lock().unwrap_or_else(PoisonError::into_inner).take()
    }
}

/// Waits until `process`, a descriptor of `pidfd_open(2)`, has ended, for at most `longest`. Returns whether it has.
fn has_ended(process: &OwnedFd, longest: Duration) -> bool {
    let mut fds = [PollFd::new(process.as_fd(), PollFlags::POLLIN)];
    let longest = PollTimeout::try_from(longest).unwrap_or(PollTimeout::MAX);
    poll(&mut fds, longest).is_ok() && fds[0].any() == Some(true)
}

/// Returns a descriptor that can be read when this process has ended (`pidfd_open(2)`).
fn own_pidfd() -> Option<OwnedFd> {
    // SAFETY: the call takes its arguments by value.
    let fd = Errno::result(unsafe { libc::syscall(libc::SYS_pidfd_open, std::process::id(), 0) }).ok()?;
    // SAFETY: the kernel has just created the descriptor, and nothing else owns it.
    Some(unsafe { OwnedFd::from_raw_fd(fd as i32) })
}

/// Numbers of the files of `regions`, whose pages a successor can map.
pub(crate) fn region_files<'a>(
    regions: impl IntoIterator<Item = &'a Region>,
    fds: &mut Fds<'a>,
) -> Result<Vec<u32>> {
    let number = |region: &'a Region| {
        let fd = region.fd().ok_or_else(|| {
            Error::new(
                ErrorKind::Unavailable,
                "cannot hand over packet memory",
                "anonymous memory is not a file",
            )
        })?;
        Ok(fds.add(fd))
    };
    regions.into_iter().map(number).collect()
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixStream;
    use std::thread;

    use super::*;

    #[test]
    #[cfg_attr(miri, ignore = "there are no sockets")]
    fn a_successor_of_the_same_program_is_accepted_and_no_other() {
        let dir = tempfile::tempdir().unwrap();
        let nobody = RunningProgram::find(dir.path(), "l2fwd", Role::Successor).unwrap_err();
        assert_eq!(nobody.kind(), ErrorKind::Unavailable);
        assert!(
            nobody.to_string().contains("there is no such socket; start l2fwd without --takeover"),
            "{nobody}"
        );
        let listener = Listener::in_dir(dir.path(), "l2fwd").unwrap();
        assert!(listener.accept().unwrap().is_none());
        let socket = dir.path().join(SOCKET);
        // A client that sends nothing delays nobody.
        let _silent = UnixStream::connect(&socket).unwrap();
        assert!(listener.accept().unwrap().is_none());
        thread::scope(|scope| {
            let other =
                scope.spawn(|| RunningProgram::find(dir.path(), "pktgen", Role::Successor).unwrap_err());
            while !other.is_finished() {
                assert!(listener.accept().unwrap().is_none());
            }
            let why = other.join().unwrap().to_string();
            assert!(why.contains("it is l2fwd, but this is pktgen"), "{why}");
            let refused =
                scope.spawn(|| RunningProgram::find(dir.path(), "l2fwd", Role::Successor).unwrap_err());
            let peer = loop {
                if let Some(accepted) = listener.accept().unwrap() {
                    break accepted;
                }
            };
            assert_eq!((peer.pid, peer.role), (std::process::id(), Role::Successor));
            assert!(!peer.has_ended(Duration::ZERO));
            peer.channel.refuse("a port restarts".to_owned()).unwrap();
            let refused = refused.join().unwrap();
            assert_eq!((refused.kind(), refused.why()), (ErrorKind::Busy, "a port restarts"));
        });
        // A killed process leaves its socket behind.
        drop(listener);
        assert!(
            RunningProgram::find(dir.path(), "l2fwd", Role::Successor)
                .unwrap_err()
                .why()
                .contains("no process listens")
        );
        Listener::in_dir(dir.path(), "l2fwd").unwrap();
    }
}
