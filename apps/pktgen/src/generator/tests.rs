use std::sync::mpsc::{Receiver, Sender, channel};

use vireo_drivers::counters::QueueCounters;
use vireo_eal::dma::{DmaMemory, MAX_FRAME, MAX_SEGMENTS, Pool};
use vireo_eal::mem::{Backing, Region};

use super::*;

/// A wire that refuses its first bursts, and loses the first frames that it takes.
struct Into {
    wire: Sender<Vec<u8>>,
    to_lose: usize,
    to_refuse: usize,
    /// Times of the first and the last refusal, in ticks of the TSC.
    refused: Option<(u64, u64)>,
    counters: QueueCounters,
}

struct Out(Receiver<Vec<u8>>, QueueCounters);

fn out(end: Receiver<Vec<u8>>) -> Out {
    Out(end, QueueCounters::default())
}

impl TxBurst for Into {
    fn tx_burst(&mut self, cache: &mut PoolCache, burst: &mut Burst) -> usize {
        if let Some(left) = self.to_refuse.checked_sub(1) {
            self.to_refuse = left;
            let now = Tsc::now();
            self.refused = Some((self.refused.map_or(now, |(first, _)| first), now));
            return 0;
        }
        let sent = burst.len();
        let mut frame = Vec::new();
        for packet in burst.drain(..) {
            let begin = frame.len();
            frame.resize(begin + packet.len(), 0);
            cache.read(&packet, 0, &mut frame[begin..]);
            let has_more = packet.has_more();
            cache.free(packet);
            if has_more {
                continue;
            }
            let frame = std::mem::take(&mut frame);
            match self.to_lose.checked_sub(1) {
                Some(left) => self.to_lose = left,
                None => self.wire.send(frame).unwrap(),
            }
        }
        sent
    }

    fn counters(&self) -> &QueueCounters {
        &self.counters
    }
}

impl RxBurst for Out {
    fn rx_burst(&mut self, cache: &mut PoolCache, burst: &mut Burst) {
        while burst.remaining_capacity() >= MAX_SEGMENTS
            && let Ok(frame) = self.0.try_recv()
        {
            // The segments differ from those that were sent.
            let mut parts = frame.chunks(1000).peekable();
            while let Some(part) = parts.next() {
                let mut packet = cache.allocate().unwrap().with_len(part.len());
                cache.write(&mut packet, 0, part);
                packet.set_more(parts.peek().is_some());
                burst.push(packet);
            }
        }
    }

    fn counters(&self) -> &QueueCounters {
        &self.1
    }
}

/// Runs `body` with the two ends of a wire that first refuses bursts and then loses frames.
fn on_a_wire<T>(
    to_lose: usize,
    to_refuse: usize,
    body: impl FnOnce((&mut Into, &mut PoolCache), (&mut Out, &mut PoolCache), &StopFlag) -> Result<T>,
) -> Result<T> {
    const BUFFERS: u32 = 1024;
    let region = Region::new(2 * Pool::bytes(BUFFERS), Backing::SmallPages)?;
    let memory = DmaMemory::map(region, &[])?;
    let (to_send, back) = (Pool::new(&memory, BUFFERS)?, Pool::new(&memory, BUFFERS)?);
    let (wire, end) = channel();
    let counters = QueueCounters::default();
    let (mut tx, mut rx) = (Into { wire, to_lose, to_refuse, refused: None, counters }, out(end));
    body((&mut tx, &mut to_send.cache()), (&mut rx, &mut back.cache()), &StopFlag::new())
}

fn stream(rate: Option<f64>, count: u64) -> Stream {
    Stream {
        run: 7,
        earlier: 0..0,
        destination: MacAddr([2, 0, 0, 0, 0, 1]),
        source: MacAddr([2, 0, 0, 0, 0, 2]),
        expect: None,
        sizes: 60..=60,
        rate,
        window: 128,
        end: End::Count(count),
        patience: PATIENCE,
    }
}

/// Waits for the path for up to `patience`, then sends 1000 frames.
fn send(to_lose: usize, patience: Duration) -> Result<Outcome> {
    let stream = stream(None, 1000);
    on_a_wire(to_lose, 0, |tx, rx, stop| {
        await_path(&stream, patience, (tx.0, tx.1), (rx.0, rx.1), stop)?;
        run(&stream, tx, rx, stop)
    })
}

#[test]
fn latency_is_measured_from_when_a_frame_was_due() {
    let (outcome, waited) = on_a_wire(0, 1_000, |tx, rx, stop| {
        let outcome = run(&stream(Some(1e6), 10), (&mut *tx.0, tx.1), rx, stop)?;
        Ok((outcome, tx.0.refused.map(|(first, last)| Tsc::to_nanos(last - first))))
    })
    .unwrap();
    assert!(outcome.is_clean());
    // The histogram has a precision of three digits.
    let (most, waited) = (outcome.latency.max(), waited.unwrap());
    assert!(most * 100 >= waited * 99, "{most} and {waited} ns");
}

#[test]
fn frames_of_several_packets_are_compared_whole() {
    let long = |run_of, patience, (to_lose, to_refuse)| {
        let stream = Stream { sizes: frame::SHORTEST..=MAX_FRAME, patience, ..stream(None, run_of) };
        on_a_wire(to_lose, to_refuse, |tx, rx, stop| run(&stream, tx, rx, stop)).unwrap()
    };
    let outcome = long(3000, PATIENCE, (0, 3));
    assert!(outcome.is_clean() && outcome.sent == 3000, "{outcome:?}");
    // What a wire refuses while this thread has no CPU would use up the patience.
    let outcome = long(300, Duration::from_millis(50), (7, 0));
    assert_eq!((outcome.sent, outcome.received, outcome.corrupt), (300, 293, 0));
}

#[test]
fn frames_that_come_after_their_run_are_late() {
    let (first, second) = on_a_wire(0, 0, |(tx, to_send), rx, stop| {
        // Nothing comes back in time: the first run receives from another wire than the one it sends on.
        let (_wire, end) = channel();
        let mut nothing = out(end);
        let hasty = Stream { patience: Duration::from_millis(1), ..stream(None, 3) };
        let first = run(&hasty, (&mut *tx, &mut *to_send), (&mut nothing, &mut *rx.1), stop)?;
        let next = Stream { run: 8, earlier: 7..8, ..stream(None, 2) };
        Ok((first, run(&next, (tx, to_send), rx, stop)?))
    })
    .unwrap();
    assert_eq!((first.sent, first.received), (3, 0));
    assert_eq!((second.received, second.late, second.strays), (2, 3, 0));
    assert!(second.is_clean());
}

#[test]
fn what_is_lost_before_the_path_works_is_no_loss() {
    let outcome = send(3, Duration::from_secs(60)).unwrap();
    assert!(outcome.is_clean() && outcome.strays == 0, "{outcome:?}");
    assert_eq!(outcome.sent, 1000);
}

#[test]
fn a_path_that_never_works_is_an_error() {
    let error = send(usize::MAX, Duration::from_millis(20)).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unavailable);
    assert!(error.to_string().contains("frames came back within"), "{error}");
}
