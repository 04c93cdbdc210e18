use std::sync::mpsc::{Receiver, Sender, channel};

use vireo_drivers::port::QueueStats;
use vireo_eal::dma::{DmaMemory, Pool};
use vireo_eal::mem::{Backing, Region};

use super::*;

/// A wire that loses its first frames.
struct Into {
    wire: Sender<Vec<u8>>,
    to_lose: usize,
}

struct Out(Receiver<Vec<u8>>);

impl TxBurst for Into {
    fn tx_burst(&mut self, cache: &mut PoolCache, burst: &mut Burst) -> usize {
        let sent = burst.len();
        for packet in burst.drain(..) {
            let mut frame = vec![0; packet.len()];
            cache.read(&packet, 0, &mut frame);
            cache.free(packet.into_buffer());
            match self.to_lose.checked_sub(1) {
                Some(left) => self.to_lose = left,
                None => self.wire.send(frame).unwrap(),
            }
        }
        sent
    }

    fn stats(&self) -> QueueStats {
        QueueStats::default()
    }
}

impl RxBurst for Out {
    fn rx_burst(&mut self, cache: &mut PoolCache, burst: &mut Burst) {
        while !burst.is_full()
            && let Ok(frame) = self.0.try_recv()
        {
            let mut packet = Packet::new(cache.allocate().unwrap(), frame.len());
            cache.write(&mut packet, 0, &frame);
            burst.push(packet);
        }
    }

    fn stats(&self) -> QueueStats {
        QueueStats::default()
    }
}

/// Waits for the path for `patience`, then sends 1000 frames.
fn send(to_lose: usize, patience: Duration) -> Result<Outcome> {
    const BUFFERS: u32 = 1024;
    let region = Region::new(2 * Pool::bytes(BUFFERS), Backing::SmallPages)?;
    let memory = DmaMemory::map(region, &[])?;
    let (to_send, back) = (Pool::new(&memory, BUFFERS)?, Pool::new(&memory, BUFFERS)?);
    let (mut to_send, mut back) = (to_send.cache(), back.cache());
    let (wire, end) = channel();
    let (mut tx, mut rx) = (Into { wire, to_lose }, Out(end));
    let stream = Stream {
        run: 7,
        destination: MacAddr([2, 0, 0, 0, 0, 1]),
        source: MacAddr([2, 0, 0, 0, 0, 2]),
        expect: None,
        sizes: 60..=60,
        rate: None,
        window: 128,
        end: End::Count(1000),
    };
    let stop = StopFlag::new();
    await_path(&stream, patience, (&mut tx, &mut to_send), (&mut rx, &mut back), &stop)?;
    run(&stream, (&mut tx, &mut to_send), (&mut rx, &mut back), &stop)
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
    assert!(error.to_string().contains("none came back"), "{error}");
}
