//! Handles `VHOST_USER_SET_VRING_ENABLE` before `VHOST_USER_SET_FEATURES`. QEMU enables the rings of a
//! network device when it creates the device, long before a driver accepts any feature. The `vhost` crate
//! treats that as a breach of the protocol, so this one request is answered here.

use std::io::Write;
use std::os::unix::net::UnixStream;

use vhost::vhost_user::message::FrontendReq;
use vhost::vhost_user::{Error, Result, VhostUserBackendReqHandlerMut};

use super::conversation::{Request, VERSION};
use crate::vhost::backend::Backend;

/// Header of a message (see [`super::conversation`]), then index and number (`vring state`).
type Message = [u32; 5];
const BYTES: usize = size_of::<Message>();

const SET_VRING_ENABLE: u32 = FrontendReq::SET_VRING_ENABLE as u32;
/// Size in bytes of the `vring state`, and of the answer.
const BODY: u32 = 8;
const VERSION_MASK: u32 = 3;
const REPLY: u32 = 1 << 2;
const NEED_REPLY: u32 = 1 << 3;

/// Answers `request` if it is `SET_VRING_ENABLE`; `None` leaves it to the crate.
pub(super) fn handle(request: &Request, backend: &mut Backend, socket: &UnixStream) -> Option<Result<()>> {
    if backend.is_negotiated() {
        return None;
    }
    let [number, flags, size, index, on] = words(request.bytes.first_chunk()?);
    let is_it =
        (number, flags & VERSION_MASK, size) == (SET_VRING_ENABLE, VERSION, BODY) && flags & REPLY == 0;
    is_it.then(|| {
        let enabled =
            if on > 1 { Err(Error::InvalidParam) } else { backend.set_vring_enable(index, on == 1) };
        if flags & NEED_REPLY != 0 {
            answer(socket, enabled.is_err().into())?;
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
fn answer(mut socket: &UnixStream, status: u32) -> Result<()> {
    let message: Message = [SET_VRING_ENABLE, VERSION | REPLY, BODY, status, 0];
    socket.write_all(message.map(u32::to_ne_bytes).as_flattened()).map_err(Error::SocketBroken)
}
