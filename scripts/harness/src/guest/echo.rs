//! Numbered frames that the guest kernel's own driver sends to a port, which sends each one back. The results
//! are counted in memory that migrates with the guest.

use std::fs::File;
use std::io::{ErrorKind, Read as _, Write as _};
use std::ops::{Range, RangeInclusive};
use std::os::fd::{AsFd as _, AsRawFd as _};

use anyhow::{Context as _, Result};
use nix::errno::Errno;
use nix::ifaddrs::getifaddrs;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::sockopt::{RcvBufForce, SndBufForce};
use nix::sys::socket::{AddressFamily, SockFlag, SockProtocol, SockType, bind, setsockopt, socket};
use serde::{Deserialize, Serialize};

use super::machine::port;
use crate::agent::PORT;
use crate::case::write;

/// Maximum number of frames in flight: half of what each ring has room for.
const WINDOW: u64 = 512;
/// Nanoseconds for which the driver may leave frames in its receive ring; the interrupt that this ring shares
/// with the transmit ring ends the wait earlier. Frames therefore wait in the ring most of the time, also
/// when the guest stops to migrate. If the port did not mark their pages, the guest then receives wrong
/// frames.
const PAUSE: &str = "200000000";
/// Milliseconds without a frame after which frames in flight are given up.
const GIVE_UP: u16 = 2000;
/// Size of the socket's queues in bytes, with room for all frames in flight.
const QUEUE: usize = 8 << 20;
/// Bytes of a frame, without the frame check sequence.
const SIZES: RangeInclusive<usize> = 60..=1514;
/// Bytes of a frame in every other run of [`RUN`] frames. Linux copies such frames out of their buffers
/// (`GOOD_COPY_LEN`) and does not write to the buffers' pages, so only the port's marks show that the pages
/// have changed.
const SHORT: RangeInclusive<usize> = 60..=114;
/// Number of frames in a run: their buffers fill more than a page.
const RUN: u64 = 64;
/// Two unused addresses, and the EtherType for local experiments (IEEE 802).
const HEADER: [u8; 14] = [2, 0, 0, 0, 0, 1, 2, 0, 0, 0, 0, 2, 0x88, 0xb5];
/// Position of the number in a frame.
const NUMBER: Range<usize> = HEADER.len()..HEADER.len() + size_of::<u64>();

/// Fate of the frames.
#[derive(Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Counts {
    /// Frames that the driver accepted, numbered from 0.
    pub(crate) sent: u64,
    /// One more than the number of the latest frame that came back.
    pub(crate) next: u64,
    /// Contiguous ranges of numbers below `next` that did not come back.
    pub(crate) lost: Vec<Range<u64>>,
    /// Frames that came back a second time or after a later frame.
    pub(crate) repeated: u64,
    /// Received frames that were never sent.
    pub(crate) corrupt: u64,
}

impl Counts {
    /// Counts a received frame. No other sender is on this wire.
    fn note(&mut self, bytes: &[u8]) {
        let number = bytes.get(NUMBER).and_then(|bytes| bytes.try_into().ok()).map(u64::from_le_bytes);
        match number.filter(|number| *number < self.sent && frame(*number) == bytes) {
            None => self.corrupt += 1,
            Some(number) if number < self.next => self.repeated += 1,
            Some(number) => {
                self.lost.extend(Some(self.next..number).filter(|lost| !lost.is_empty()));
                self.next = number + 1;
            }
        }
    }
}

/// Builds frame `number`, whose length and bytes depend on the number.
fn frame(number: u64) -> Vec<u8> {
    let mut random = fastrand::Rng::with_seed(number);
    let mut frame = vec![0; random.usize(if (number / RUN).is_multiple_of(2) { SHORT } else { SIZES })];
    random.fill(&mut frame);
    frame[..HEADER.len()].copy_from_slice(&HEADER);
    frame[NUMBER].copy_from_slice(&number.to_le_bytes());
    frame
}

/// Opens a packet socket on `interface` (packet(7)).
fn wire(interface: &str) -> Result<File> {
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let socket = socket(AddressFamily::Packet, SockType::Raw, flags, SockProtocol::EthAll)?;
    setsockopt(&socket, RcvBufForce, &QUEUE)?;
    setsockopt(&socket, SndBufForce, &QUEUE)?;
    let address = getifaddrs()?
        .filter(|address| address.interface_name == interface)
        .find_map(|address| address.address?.as_link_addr().copied())
        .with_context(|| format!("there is no interface {interface}"))?;
    bind(socket.as_raw_fd(), &address)?;
    Ok(socket.into())
}

/// Whether the socket's queue or its driver's queue is full.
fn is_full(error: &std::io::Error) -> bool {
    error.kind() == ErrorKind::WouldBlock || error.raw_os_error() == Some(Errno::ENOBUFS as i32)
}

/// Sends frames from `interface` until the host writes to the port, waits for the frames in flight, and
/// prints [`Counts`].
pub(crate) fn run(interface: &str) -> Result<()> {
    for (attribute, value) in [("napi_defer_hard_irqs", "1"), ("gro_flush_timeout", PAUSE)] {
        write(format!("/sys/class/net/{interface}/{attribute}"), value)?;
    }
    let mut wire = wire(interface)?;
    let mut host = File::open(port(PORT)?.context("the guest has no virtio-serial port for the harness")?)?;
    let (mut counts, mut given_up, mut is_ending) = (Counts::default(), 0, false);
    let mut bytes = [0; 2048];
    while !is_ending || counts.next < counts.sent {
        while !is_ending && counts.sent - counts.next.max(given_up) < WINDOW {
            match wire.write(&frame(counts.sent)) {
                Ok(_) => counts.sent += 1,
                Err(error) if is_full(&error) => break,
                Err(error) => return Err(error).context("cannot send"),
            }
        }
        let mut ready =
            [PollFd::new(wire.as_fd(), PollFlags::POLLIN), PollFd::new(host.as_fd(), PollFlags::POLLIN)];
        let watched = if is_ending { 1 } else { 2 };
        if poll(&mut ready[..watched], PollTimeout::from(GIVE_UP))? == 0 {
            if is_ending {
                break;
            }
            given_up = counts.sent;
        }
        let stop_requested = ready[1].revents().is_some_and(|events| events.contains(PollFlags::POLLIN));
        if stop_requested && !is_ending {
            is_ending = host.read(&mut bytes)? > 0;
        }
        loop {
            match wire.read(&mut bytes) {
                Ok(len) => counts.note(&bytes[..len]),
                Err(error) if error.kind() == ErrorKind::WouldBlock => break,
                Err(error) => return Err(error).context("cannot receive"),
            }
        }
    }
    println!("{}", serde_json::to_string(&counts)?);
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_comes_back_is_told_apart() {
        let mut counts = Counts { sent: 10, ..Counts::default() };
        for number in [0, 1, 4, 5, 4, 9] {
            counts.note(&frame(number));
        }
        let mut other = frame(9);
        *other.last_mut().unwrap() ^= 1;
        for bytes in [&other[..], &frame(9)[..59], &frame(10), &[]] {
            counts.note(bytes);
        }
        assert_eq!(counts, Counts { sent: 10, next: 10, lost: vec![2..4, 6..9], repeated: 1, corrupt: 4 });
    }

    #[test]
    fn frames_differ_in_length_and_content() {
        let frames: Vec<_> = (0..1000).map(frame).collect();
        assert!(frames.iter().all(|frame| SIZES.contains(&frame.len())));
        assert!(frames.windows(2).all(|pair| pair[0][NUMBER.end..60] != pair[1][NUMBER.end..60]));
        assert!(frames.windows(2).filter(|pair| pair[0].len() != pair[1].len()).count() > 900);
    }
}
