//! Handles `VHOST_USER_SET_VRING_ENABLE` before `VHOST_USER_SET_FEATURES`. QEMU enables the rings of a
//! network device when it creates the device, long before a driver accepts any feature. The `vhost` crate
//! treats that as a breach of the protocol, so this one request is answered here.

use std::io::{Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::sync::{Mutex, PoisonError};

use nix::sys::socket::{MsgFlags, recv};
use vhost::vhost_user::{BackendReqHandler, Error, Result, VhostUserBackendReqHandlerMut};

use super::Backend;

/// Request, flags and size (vhost-user, "Header"), then index and number (`vring state`).
type Message = [u32; 5];
const BYTES: usize = size_of::<Message>();

const SET_VRING_ENABLE: u32 = 18;
/// Size in bytes of the `vring state`, and of the answer.
const BODY: u32 = 8;
/// Protocol version, in the lower two bits of the flags.
const VERSION: u32 = 1;
const VERSION_MASK: u32 = 3;
const REPLY: u32 = 1 << 2;
const NEED_REPLY: u32 = 1 << 3;

/// Answers the next request if it is `SET_VRING_ENABLE`; `None` leaves it to the crate.
pub(super) fn handle(
    handler: &BackendReqHandler<Mutex<Backend>>,
    backend: &Mutex<Backend>,
) -> Option<Result<()>> {
    let mut backend = backend.lock().unwrap_or_else(PoisonError::into_inner);
    if backend.is_negotiated() {
        return None;
    }
    let mut bytes = [0; BYTES];
    let peeked = recv(handler.as_raw_fd(), &mut bytes, MsgFlags::MSG_PEEK);
    let [request, flags, size, index, on] = words(&bytes);
    let is_it = peeked == Ok(BYTES)
        && (request, flags & VERSION_MASK, size) == (SET_VRING_ENABLE, VERSION, BODY)
        && flags & REPLY == 0;
    is_it.then(|| {
        let mut stream = handler.try_clone_connection().map_err(Error::SocketError)?;
        stream.read_exact(&mut bytes).map_err(Error::SocketBroken)?;
        let enabled =
            if on > 1 { Err(Error::InvalidParam) } else { backend.set_vring_enable(index, on == 1) };
        if flags & NEED_REPLY != 0 {
            answer(&mut stream, enabled.is_err().into())?;
        }
        enabled
    })
}

fn words(bytes: &[u8; BYTES]) -> Message {
    let mut words = [0; 5];
    for (word, bytes) in words.iter_mut().zip(bytes.as_chunks().0) {
        *word = u32::from_ne_bytes(*bytes);
    }
    words
}

/// Answers as with `VHOST_USER_PROTOCOL_F_REPLY_ACK`: 0 is success.
fn answer(stream: &mut UnixStream, status: u32) -> Result<()> {
    let message: Message = [SET_VRING_ENABLE, VERSION | REPLY, BODY, status, 0];
    let bytes: Vec<u8> = message.iter().flat_map(|word| word.to_ne_bytes()).collect();
    stream.write_all(&bytes).map_err(Error::SocketBroken)
}
