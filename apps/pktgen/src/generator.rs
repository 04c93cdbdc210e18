//! Sends a stream on one port and receives it on another, in one loop on one lcore.

#[cfg(test)]
mod tests;

use std::ops::{Range, RangeInclusive};
use std::time::Duration;

use hdrhistogram::Histogram;
use vireo_drivers::port::{MacAddr, RxBurst, TxBurst};
use vireo_eal::clock::Tsc;
use vireo_eal::dma::{Burst, DATA_ROOM, MAX_BURST, PoolCache, frames};
use vireo_eal::lcore::StopFlag;
use vireo_eal::{Error, ErrorKind, Result};

use crate::frame::{self, Arrivals, Tag, Wrong};

/// A stream of frames to send, and what should come back.
#[derive(Clone, Debug, PartialEq)]
pub struct Stream {
    /// Run number. Frames of other runs are strays, except those of [`Stream::earlier`] runs.
    pub run: u32,
    /// Numbers of runs that ended before all of their frames had come back. Their frames that arrive now are
    /// late.
    pub earlier: Range<u32>,
    /// Destination address of the frames: the first port of the forwarder.
    pub destination: MacAddr,
    /// Source address of the frames: the sending port.
    pub source: MacAddr,
    /// Destination and source addresses that the forwarder gives the frames, if they are to be checked.
    pub expect: Option<Expect>,
    /// Range of frame lengths in bytes, without frame check sequence.
    pub sizes: RangeInclusive<usize>,
    /// Frames per second; `None` for as many as possible.
    pub rate: Option<f64>,
    /// Maximum number of frames in flight. It keeps queues between the ports from overflowing, so that a
    /// missing frame is a dropped one.
    pub window: u64,
    /// When to stop.
    pub end: End,
    /// Time without a frame sent or received after which frames in flight are given up.
    pub patience: Duration,
}

/// End of a stream.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum End {
    /// After this many frames.
    Count(u64),
    /// After this time.
    After(Duration),
    /// When the first frame has come back, or after this time.
    FirstArrival(Duration),
}

/// Addresses that frames must have when they come back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Expect {
    /// Destination address; `None` for any.
    pub destination: Option<MacAddr>,
    /// Source address; `None` for any.
    pub source: Option<MacAddr>,
}

/// What was sent and what came back.
#[derive(Debug)]
pub struct Outcome {
    /// Frames handed to the sending port.
    pub sent: u64,
    /// Frames of this run that came back, each counted once.
    pub received: u64,
    /// Frames that came back more than once.
    pub duplicates: u64,
    /// Frames that came back after a later one.
    pub reordered: u64,
    /// Frames that came back with addresses other than expected.
    pub wrong_address: u64,
    /// Frames of this run that came back damaged; none of them is counted as received.
    pub corrupt: u64,
    /// Frames of [`Stream::earlier`] runs.
    pub late: u64,
    /// Other frames that do not belong to this run.
    pub strays: u64,
    /// When the first frame came back, in ticks of the TSC.
    pub first: Option<u64>,
    /// Time from the first frame sent to the last one received.
    pub elapsed: Duration,
    /// Nanoseconds from when a frame was due to its arrival. With a rate, frame *n* is due *n* ÷ rate after
    /// the start, even if the window, the queue or this process delayed it. Without a rate, a frame is due
    /// when it is written.
    pub latency: Histogram<u64>,
}

impl Outcome {
    /// Returns the number of frames that came back per second.
    pub fn rate(&self) -> f64 {
        self.received as f64 / self.elapsed.as_secs_f64().max(1e-9)
    }

    /// Returns whether every frame came back once, in order, undamaged and with the expected addresses.
    pub fn is_clean(&self) -> bool {
        self.sent == self.received
            && [self.duplicates, self.reordered, self.wrong_address, self.corrupt] == [0; 4]
    }
}

/// A [`Stream::patience`] longer than the second for which QEMU's e1000 holds frames back after a write to
/// RCTL.
pub const PATIENCE: Duration = Duration::from_secs(2);
/// Frames per second while waiting for the first one to come back.
pub const PROBE_RATE: f64 = 1000.0;
/// Longest latency that the histogram holds, in nanoseconds: a minute.
const LONGEST: u64 = 60_000_000_000;

/// Sends frames like those of `stream`, but of another run, until one comes back. Frames that are lost before
/// a forwarder is ready are then not losses of the stream. DPDK's virtio driver, for example, discards what
/// it receives while it starts.
///
/// # Errors
/// `Unavailable` when none has come back within `patience`; otherwise as for [`run`].
pub fn await_path<T: TxBurst, R: RxBurst>(
    stream: &Stream,
    patience: Duration,
    tx: (&mut T, &mut PoolCache),
    rx: (&mut R, &mut PoolCache),
    stop: &StopFlag,
) -> Result<()> {
    let end = End::FirstArrival(patience);
    let probes = Stream { run: !stream.run, rate: Some(PROBE_RATE), end, ..stream.clone() };
    let outcome = run(&probes, tx, rx, stop)?;
    if outcome.received > 0 || stop.is_set() {
        return Ok(());
    }
    let seconds = patience.as_secs_f64();
    let why = format!("none of {} frames came back within {seconds} s", outcome.sent);
    Err(Error::new(ErrorKind::Unavailable, "cannot start the stream", why)
        .with_hint("check that a forwarder connects the two ports and that --dst-mac is its address"))
}

/// Runs `stream` until its end or until `stop`, and waits for frames in flight. Each queue comes with the
/// cache that it allocates buffers from and frees them to.
///
/// # Errors
/// `Usage` when the frames are too short or too long.
pub fn run<T: TxBurst, R: RxBurst>(
    stream: &Stream,
    (tx, to_send): (&mut T, &mut PoolCache),
    (rx, cache): (&mut R, &mut PoolCache),
    stop: &StopFlag,
) -> Result<Outcome> {
    let (shortest, longest) = (*stream.sizes.start(), *stream.sizes.end());
    if shortest < frame::SHORTEST || longest > frame::LONGEST || shortest > longest {
        return Err(Error::new(
            ErrorKind::Usage,
            format!("cannot send frames of {shortest} to {longest} bytes"),
            format!("a frame has {} to {} bytes", frame::SHORTEST, frame::LONGEST),
        ));
    }
    let latency = Histogram::new_with_bounds(1, LONGEST, 3).map_err(|error| {
        Error::new(ErrorKind::Os, "cannot create the latency histogram", error.to_string())
    })?;
    let mut state = State {
        stream,
        start: Tsc::now(),
        last: 0,
        first: None,
        sent: 0,
        given_up: 0,
        given_up_below: 0,
        wrong_address: 0,
        corrupt: 0,
        late: 0,
        strays: 0,
        bytes: [0; frame::LONGEST],
        arrivals: Arrivals::default(),
        latency,
        burst: Burst::new(),
    };
    let give_up = Tsc::from_nanos(stream.patience.as_nanos() as u64);
    state.last = state.start;
    let mut progress = state.start;
    loop {
        let now = Tsc::now();
        let ended = stop.is_set() || state.ended(now);
        let due = if ended { 0 } else { state.due(now) };
        if due > 0 && state.send(due, tx, to_send) > 0 {
            progress = now;
        }
        if state.receive(rx, cache) > 0 {
            progress = now;
        }
        let missing = state.sent - state.arrivals.unique - state.given_up;
        if ended && missing == 0 {
            break;
        }
        if missing == 0 && due == 0 {
            progress = now;
        }
        if now.wrapping_sub(progress) > give_up {
            state.given_up += missing;
            state.given_up_below = state.sent;
            // The stream has ended, or nothing is in flight and the TX queue takes nothing: no progress is
            // possible.
            if ended || missing == 0 {
                break;
            }
        }
    }
    Ok(state.outcome())
}

struct State<'a> {
    stream: &'a Stream,
    start: u64,
    /// When the last frame came back.
    last: u64,
    sent: u64,
    /// When the first frame came back.
    first: Option<u64>,
    /// Frames that are no longer waited for.
    given_up: u64,
    /// Frames below this sequence number that have not come back are given up.
    given_up_below: u64,
    wrong_address: u64,
    corrupt: u64,
    late: u64,
    strays: u64,
    /// The frame that is being written or read.
    bytes: [u8; frame::LONGEST],
    arrivals: Arrivals,
    latency: Histogram<u64>,
    burst: Burst,
}

impl State<'_> {
    fn ended(&self, now: u64) -> bool {
        let over =
            |time: Duration| u128::from(Tsc::to_nanos(now.wrapping_sub(self.start))) >= time.as_nanos();
        match self.stream.end {
            End::Count(count) => self.sent >= count,
            End::After(time) => over(time),
            End::FirstArrival(time) => self.first.is_some() || over(time),
        }
    }

    /// Returns the number of frames that may be sent now, by window, rate and count, at most a burst.
    fn due(&self, now: u64) -> usize {
        let on_their_way = self.sent - self.given_up - self.arrivals.unique;
        let mut due = self.stream.window.saturating_sub(on_their_way).min(MAX_BURST as u64);
        if let Some(rate) = self.stream.rate {
            let seconds = Tsc::to_nanos(now.wrapping_sub(self.start)) as f64 / 1e9;
            due = due.min(((seconds * rate) as u64 + 1).saturating_sub(self.sent));
        }
        if let End::Count(count) = self.stream.end {
            due = due.min(count - self.sent);
        }
        due as usize
    }

    /// Returns when a frame is due, in ticks of the TSC.
    fn due_at(&self, sequence: u64) -> u64 {
        let now = Tsc::now();
        self.stream.rate.map_or(now, |rate| {
            let nanos = sequence as f64 / rate * 1e9;
            (self.start + Tsc::from_nanos(nanos as u64)).min(now)
        })
    }

    fn send<T: TxBurst>(&mut self, due: usize, tx: &mut T, cache: &mut PoolCache) -> usize {
        let mut written = 0;
        while written < due {
            let Stream { run, destination, source, ref sizes, .. } = *self.stream;
            let sequence = self.sent + written as u64;
            let len = frame::length(sizes, sequence);
            if len.div_ceil(DATA_ROOM) > self.burst.remaining_capacity() {
                break;
            }
            let tag = Tag { run, sequence, ticks: self.due_at(sequence) };
            frame::write(&mut self.bytes[..len], destination, source, tag);
            if self.put(len, cache).is_none() {
                break;
            }
            written += 1;
        }
        if written > 0 {
            tx.tx_burst(cache, &mut self.burst);
        }
        let sent = written - frames(&self.burst).count();
        self.sent += sent as u64;
        // Frames that the queue did not take are written again next time, with their due time then.
        for packet in self.burst.drain(..) {
            cache.free(packet);
        }
        sent
    }

    /// Appends the frame in the first `len` bytes of `self.bytes` to the burst, in as few packets as
    /// possible. Returns `None` if too few buffers are free.
    fn put(&mut self, len: usize, cache: &mut PoolCache) -> Option<()> {
        let before = self.burst.len();
        for part in self.bytes[..len].chunks(DATA_ROOM) {
            let Some(buffer) = cache.allocate() else {
                self.burst.drain(before..).for_each(|packet| cache.free(packet));
                return None;
            };
            let mut packet = buffer.with_len(part.len());
            cache.write(&mut packet, 0, part);
            self.burst.push(packet);
        }
        if let [segments @ .., _] = &mut self.burst[before..] {
            segments.iter_mut().for_each(|packet| packet.set_more(true));
        }
        Some(())
    }

    fn receive<R: RxBurst>(&mut self, rx: &mut R, cache: &mut PoolCache) -> usize {
        rx.rx_burst(cache, &mut self.burst);
        let (mut received, mut len) = (0, 0);
        for packet in std::mem::take(&mut self.burst) {
            let begin = len;
            len += packet.len();
            if let Some(part) = self.bytes.get_mut(begin..len) {
                cache.read(&packet, 0, part);
            }
            let has_more = packet.has_more();
            cache.free(packet);
            if has_more {
                continue;
            }
            received += 1;
            let bytes = self.bytes.get(..std::mem::take(&mut len));
            match bytes.map_or(Err(Wrong::Stray), |bytes| frame::read(bytes, self.stream.run)) {
                Ok((destination, source, tag)) if tag.sequence < self.sent => {
                    self.note(destination, source, tag);
                }
                Err(Wrong::OtherRun(run)) if self.stream.earlier.contains(&run) => self.late += 1,
                Err(Wrong::OtherRun(_) | Wrong::Stray) => self.strays += 1,
                _ => self.corrupt += 1,
            }
        }
        received
    }

    fn note(&mut self, destination: MacAddr, source: MacAddr, tag: Tag) {
        self.last = Tsc::now();
        let nanos = Tsc::to_nanos(self.last.saturating_sub(tag.ticks));
        self.latency.saturating_record(nanos.max(1));
        self.first.get_or_insert(self.last);
        if self.arrivals.note(tag.sequence) && tag.sequence < self.given_up_below {
            self.given_up -= 1;
        }
        if let Some(expect) = self.stream.expect {
            let differs = |expected: Option<MacAddr>, found| expected.is_some_and(|mac| mac != found);
            if differs(expect.destination, destination) || differs(expect.source, source) {
                self.wrong_address += 1;
            }
        }
    }

    fn outcome(self) -> Outcome {
        Outcome {
            sent: self.sent,
            received: self.arrivals.unique,
            duplicates: self.arrivals.duplicates,
            reordered: self.arrivals.reordered,
            wrong_address: self.wrong_address,
            corrupt: self.corrupt,
            late: self.late,
            strays: self.strays,
            first: self.first,
            elapsed: Duration::from_nanos(Tsc::to_nanos(self.last.wrapping_sub(self.start))),
            latency: self.latency,
        }
    }
}
