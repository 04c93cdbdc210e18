//! Messages between two processes, with descriptors.

use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{UnixCredentials, getsockopt, sockopt::PeerCredentials};
use postcard_schema::Schema;
use postcard_schema::key::Key;
use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::error::{Error, ErrorKind, Result};
use crate::rights;

/// Maximum length of a message in bytes: the records of the largest rings of 128 queue pairs on 32 ports.
const MAX_MESSAGE: u32 = 1 << 28;
/// How long the other process may take to read a message, or to send the rest of one.
pub(super) const PATIENCE: Duration = Duration::from_secs(2);

pub(super) const CANNOT: &str = "cannot use the ports of the running program";

/// Version of what records mean. It changes when a program would misread the record of another although both have the
/// same types: their types are compared anyway.
const MEANING: &str = "vireo 1";

/// The running program's answers: the encoded record that was asked for, or why it is refused.
type Answer = std::result::Result<Vec<u8>, String>;

/// Identifies the names and types of all parts of a record, and [`MEANING`].
const fn form<T: Schema>() -> [u8; 8] {
    Key::for_path::<T>(MEANING).to_bytes()
}

/// Encodes a record, with what identifies its form.
///
/// # Errors
/// `Protocol` if the record has a part that cannot be encoded.
pub fn encode<T: Serialize + Schema>(record: &T) -> Result<Vec<u8>> {
    let form = const { form::<T>() }.to_vec();
    postcard::to_extend(record, form).map_err(|error| {
        Error::new(ErrorKind::Protocol, "cannot hand over to another process", error.to_string())
    })
}

/// Decodes a record.
///
/// # Errors
/// `Busy` if it is a record of another form, as a program of another version has; `Protocol` if it is none.
pub fn decode<T: DeserializeOwned + Schema>(bytes: &[u8]) -> Result<T> {
    let refused = |why| Error::new(ErrorKind::Protocol, CANNOT, why);
    let record = bytes.strip_prefix(&const { form::<T>() });
    let other = || {
        Error::new(ErrorKind::Busy, CANNOT, "it is of another version, whose records differ")
            .with_hint("run the same version of both")
    };
    match postcard::take_from_bytes(record.ok_or_else(other)?) {
        Ok((record, [])) => Ok(record),
        Ok(_) => Err(refused("a record is longer than expected".to_owned())),
        Err(error) => Err(refused(error.to_string())),
    }
}

/// Descriptors that accompany a message. The message names them by their numbers.
#[derive(Debug, Default)]
pub struct Fds<'a>(Vec<Sent<'a>>);

#[derive(Debug)]
enum Sent<'a> {
    Borrowed(BorrowedFd<'a>),
    Owned(OwnedFd),
}

impl AsFd for Sent<'_> {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match self {
            Self::Borrowed(fd) => *fd,
            Self::Owned(fd) => fd.as_fd(),
        }
    }
}

impl<'a> Fds<'a> {
    /// Adds a descriptor, unless it is there already. Returns its number.
    pub fn add(&mut self, fd: BorrowedFd<'a>) -> u32 {
        let known = self.0.iter().position(|known| known.as_fd().as_raw_fd() == fd.as_raw_fd());
        known.map_or_else(|| self.push(Sent::Borrowed(fd)), |number| number as u32)
    }

    /// Adds a duplicate of a descriptor that may be closed before the message is sent. Returns its number.
    ///
    /// # Errors
    /// `Os` if the process has too many open files.
    pub fn add_duplicate(&mut self, fd: BorrowedFd<'_>) -> Result<u32> {
        let fd = fd.try_clone_to_owned().map_err(|error| Error::io(CANNOT, &error))?;
        Ok(self.push(Sent::Owned(fd)))
    }

    fn push(&mut self, fd: Sent<'a>) -> u32 {
        self.0.push(fd);
        self.0.len() as u32 - 1
    }

    /// Duplicates the descriptors within this process, for tests of a hand-over without another process.
    ///
    /// # Errors
    /// `Os` if the process has too many open files.
    pub fn duplicate(&self) -> Result<ReceivedFds> {
        let fds = self.0.iter().map(|fd| fd.as_fd().try_clone_to_owned()).collect::<std::io::Result<_>>();
        fds.map(ReceivedFds).map_err(|error| Error::io(CANNOT, &error))
    }
}

/// Descriptors that came with a message.
#[derive(Debug, Default)]
pub struct ReceivedFds(Vec<OwnedFd>);

impl ReceivedFds {
    /// Returns a duplicate of descriptor `number`.
    ///
    /// # Errors
    /// `Protocol` if there is none; `Os` if the process has too many open files.
    pub fn get(&self, number: u32) -> Result<OwnedFd> {
        let fd = self.0.get(number as usize);
        let fd = fd.ok_or_else(|| Error::new(ErrorKind::Protocol, CANNOT, "a descriptor is missing"))?;
        fd.try_clone().map_err(|error| Error::io(CANNOT, &error))
    }
}

/// Connection between a running program and a process that takes over or shares its ports.
#[derive(Debug)]
pub struct Channel {
    socket: UnixStream,
}

impl AsFd for Channel {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

impl Channel {
    pub(super) fn new(socket: UnixStream) -> std::io::Result<Self> {
        socket.set_read_timeout(Some(PATIENCE))?;
        socket.set_write_timeout(Some(PATIENCE))?;
        Ok(Self { socket })
    }

    /// Sends a message.
    ///
    /// # Errors
    /// If the other process has closed the connection or does not read within 2 s.
    pub fn send<T: Serialize + Schema>(&self, message: &T, fds: &Fds<'_>) -> Result<()> {
        let what = "cannot send to the other process";
        let bytes = encode(message)?;
        let len = u32::try_from(bytes.len()).ok().filter(|len| *len <= MAX_MESSAGE);
        let len = len.ok_or_else(|| Error::new(ErrorKind::Protocol, what, "the message is too long"))?;
        let message = [&len.to_ne_bytes()[..], &bytes].concat();
        let fds: Vec<_> = fds.0.iter().map(AsFd::as_fd).collect();
        if fds.len() > rights::MAX_FDS {
            let why = format!("it has {} descriptors, and a message at most {}", fds.len(), rights::MAX_FDS);
            return Err(Error::new(ErrorKind::Unavailable, what, why));
        }
        let sent = rights::send(&self.socket, &message, &fds).map_err(|errno| Error::os(what, errno))?;
        (&self.socket).write_all(&message[sent..]).map_err(|error| Error::io(what, &error))
    }

    /// Receives a message.
    ///
    /// # Errors
    /// `Unavailable` if the other process has closed the connection, or sends nothing for `longest`; `Protocol` if it
    /// sends something else.
    pub fn receive<T: DeserializeOwned + Schema>(&self, longest: Duration) -> Result<(T, ReceivedFds)> {
        let what = "cannot receive from the other process";
        let ended = || Error::new(ErrorKind::Unavailable, what, "it has closed the connection");
        if !self.has_message(longest)? {
            return Err(Error::new(
                ErrorKind::Unavailable,
                what,
                format!("it has sent nothing for {longest:?}"),
            ));
        }
        let mut len = [0; size_of::<u32>()];
        let (read, fds) = rights::receive(&self.socket, &mut len, what)?;
        if read == 0 {
            return Err(ended());
        }
        let rest = |error: std::io::Error| match error.kind() {
            std::io::ErrorKind::UnexpectedEof => ended(),
            _ => Error::io(what, &error),
        };
        (&self.socket).read_exact(&mut len[read..]).map_err(rest)?;
        let len = u32::from_ne_bytes(len);
        if len > MAX_MESSAGE {
            return Err(Error::new(ErrorKind::Protocol, what, "the message is not from Vireo"));
        }
        let mut bytes = Vec::new();
        (&self.socket).take(len.into()).read_to_end(&mut bytes).map_err(rest)?;
        if bytes.len() < len as usize {
            return Err(ended());
        }
        Ok((decode(&bytes)?, ReceivedFds(fds)))
    }

    /// Waits until a message has arrived, or the connection has ended, for at most `longest`. Returns whether that is the
    /// case.
    ///
    /// # Errors
    /// `Os` if the kernel lacks memory.
    pub fn has_message(&self, longest: Duration) -> Result<bool> {
        let timeout = PollTimeout::try_from(longest).unwrap_or(PollTimeout::MAX);
        match poll(&mut [PollFd::new(self.socket.as_fd(), PollFlags::POLLIN)], timeout) {
            Ok(ready) => Ok(ready > 0),
            // A signal asks the program to stop, which takes precedence.
            Err(Errno::EINTR) => Ok(false),
            Err(errno) => Err(Error::os("cannot wait for the other process", errno)),
        }
    }

    /// Refuses messages from the other process that have not arrived yet: its next [`Channel::send`] fails.
    pub fn close(&self) {
        // Fails only if the connection has ended.
        let _ = self.socket.shutdown(Shutdown::Read);
    }

    /// Sends the other process the record that it asked for.
    ///
    /// # Errors
    /// As for [`Channel::send`].
    pub fn reply<T: Serialize + Schema>(&self, record: &T, fds: &Fds<'_>) -> Result<()> {
        self.send(&Answer::Ok(encode(record)?), fds)
    }

    /// Sends the other process the reason why it does not get what it asked for.
    ///
    /// # Errors
    /// As for [`Channel::send`].
    pub fn refuse(&self, why: String) -> Result<()> {
        self.send(&Answer::Err(why), &Fds::default())
    }

    /// Receives the running program's answer.
    ///
    /// # Errors
    /// As for [`Channel::receive`]; `Busy` with the predecessor's reason if it refuses.
    pub fn answer<T: DeserializeOwned + Schema>(&self, longest: Duration) -> Result<(T, ReceivedFds)> {
        let (answer, fds) = self.receive::<Answer>(longest)?;
        let refused = |why| Error::new(ErrorKind::Busy, CANNOT, why);
        Ok((decode(&answer.map_err(refused)?)?, fds))
    }

    /// The process that has connected. To that process, the kernel reports the one that created the listening socket,
    /// which may be an earlier predecessor.
    pub(super) fn peer(&self) -> nix::Result<UnixCredentials> {
        getsockopt(&self.socket, PeerCredentials)
    }
}

#[cfg(test)]
mod tests {
    use std::io::Seek;
    use std::thread;

    use serde::Deserialize;

    use super::*;

    /// A connection between a predecessor and a successor.
    fn channels() -> [Channel; 2] {
        let (one, other) = UnixStream::pair().unwrap();
        [one, other].map(|socket| Channel::new(socket).unwrap())
    }

    #[test]
    #[cfg_attr(miri, ignore = "Miri does not support poll")]
    fn messages_of_any_length_arrive_with_their_descriptors() {
        let [one, other] = channels();
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(b"pages").unwrap();
        for len in [0, 1, 1 << 20] {
            let words: Vec<u32> = (0..len).collect();
            thread::scope(|scope| {
                scope.spawn(|| {
                    let mut fds = Fds::default();
                    assert_eq!(
                        [fds.add(file.as_fd()), fds.add(one.socket.as_fd()), fds.add(file.as_fd())],
                        [0, 1, 0]
                    );
                    one.send(&words, &fds).unwrap();
                });
                let (received, fds) = other.receive::<Vec<u32>>(Duration::from_secs(60)).unwrap();
                assert_eq!(received, words);
                let (mut again, mut text) = (std::fs::File::from(fds.get(0).unwrap()), String::new());
                again.rewind().unwrap();
                again.read_to_string(&mut text).unwrap();
                assert_eq!(text, "pages");
                assert!(fds.get(1).is_ok() && fds.get(2).is_err());
            });
        }
    }

    #[test]
    #[cfg_attr(miri, ignore = "Miri does not support poll")]
    fn the_end_of_a_connection_is_told_from_silence_and_from_nonsense() {
        let [one, other] = channels();
        let receive = |longest| other.receive::<Vec<u32>>(longest).unwrap_err();
        assert!(receive(Duration::from_millis(1)).why().contains("has sent nothing for 1ms"));
        (&one.socket).write_all(&[0xff; 4]).unwrap();
        assert_eq!(receive(Duration::ZERO).kind(), ErrorKind::Protocol);
        // A list of 200 words that has one.
        let words = [&form::<Vec<u32>>()[..], &[200, 1, 7]].concat();
        (&one.socket).write_all(&[&[words.len() as u8, 0, 0, 0], &words[..]].concat()).unwrap();
        assert_eq!(receive(Duration::ZERO).kind(), ErrorKind::Protocol);
        (&one.socket).write_all(&[3, 0, 0, 0, 2]).unwrap();
        drop(one);
        for _ in 0..2 {
            let error = receive(Duration::ZERO);
            assert_eq!((error.kind(), error.why()), (ErrorKind::Unavailable, "it has closed the connection"));
        }
    }

    /// Programs of different versions read each other's records only if all parts are the same.
    #[test]
    fn a_record_of_another_form_is_refused() {
        #[derive(Debug, PartialEq, Serialize, Deserialize, Schema)]
        struct Port {
            number: u32,
        }
        mod renamed {
            use super::*;
            #[derive(Serialize, Deserialize, Schema)]
            pub(super) struct Port {
                pub(super) index: u32,
            }
        }
        mod retyped {
            use super::*;
            #[derive(Serialize, Deserialize, Schema)]
            pub(super) struct Port {
                pub(super) number: u16,
            }
        }
        assert_eq!(
            decode::<Vec<Port>>(&encode(&vec![Port { number: 7 }]).unwrap()).unwrap(),
            [Port { number: 7 }]
        );
        let [renamed, retyped] = [
            encode(&vec![renamed::Port { index: 7 }]).unwrap(),
            encode(&vec![retyped::Port { number: 7 }]).unwrap(),
        ];
        for other in [&renamed[..], &retyped, &[], &[0; 7]] {
            let error = decode::<Vec<Port>>(other).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Busy);
            assert_eq!(error.why(), "it is of another version, whose records differ");
        }
    }

    /// Either the message arrives, or its sender learns that it does not.
    #[test]
    #[cfg_attr(miri, ignore = "Miri does not support poll")]
    fn a_message_that_meets_a_closed_connection_is_refused_or_arrives() {
        let send = |channel: &Channel| channel.send(&"it polls", &Fds::default()).is_ok();
        let receive = |channel: &Channel| channel.receive::<String>(Duration::ZERO).is_ok();
        let [one, other] = channels();
        other.close();
        assert_eq!([send(&one), receive(&other)], [false; 2]);
        let [one, other] = channels();
        assert!(send(&one));
        other.close();
        assert!(receive(&other));
        for round in 0..2000 {
            let [one, other] = channels();
            let sent = thread::scope(|scope| {
                let sent = scope.spawn(|| send(&one));
                (0..round % 50).for_each(|_| thread::yield_now());
                other.close();
                sent.join().unwrap()
            });
            assert_eq!(receive(&other), sent);
        }
    }
}
