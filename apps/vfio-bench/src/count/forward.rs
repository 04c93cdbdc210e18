//! What forwarding takes on a real NIC: one thread is generator and forwarder in turn, so that no clock runs for the other.

use std::time::Duration;

use vireo_bus_pci::Bus;
use vireo_eal::clock::Tsc;
use vireo_eal::dma::MAX_BURST;
use vireo_eal::lcore::StopFlag;
use vireo_eal::vfio::VfioMode;
use vireo_eal::{Error, ErrorKind, Result};
use vireo_l2fwd::forward::{PairCounts, forward_any};

use super::run::{Step, measured};
use crate::measure::{Side, Wiring};

/// Polls whose median counts.
const SAMPLES: usize = 64;
/// Polls after which a NIC that brings no full burst is given up.
const PATIENCE: usize = 100_000;
/// Polls after which frames that have not come are lost.
const RESEND: usize = 1000;
/// Packets of a full burst.
const BURST: u64 = MAX_BURST as u64;
/// A device may bring a burst in parts, and a poll that only ends it is none that moves it.
const ARRIVAL: Duration = Duration::from_millis(1);
/// QEMU's e1000 receives nothing for a second after a write of RCTL.
const DEAF: Duration = Duration::from_millis(1200);

/// The forwarder's start, and a poll of both its lanes that moves a full burst on one.
pub(super) fn steps(bus: &Bus, wiring: &Wiring, mode: VfioMode) -> Result<Vec<Step>> {
    let mut generator = Side::start(bus, [&wiring.sender, &wiring.receiver], mode, true)?;
    let (forwarder, start) =
        measured("start", || Side::start(bus, [&wiring.inner[0], &wiring.inner[1]], mode, false));
    let mut forwarder = forwarder?;
    std::thread::sleep(DEAF);
    let ticks = full_polls(&mut generator, &mut forwarder)?;
    forwarder.stop("forwarder")?;
    generator.stop("generator")?;
    let instructions = Tsc::to_nanos(ticks);
    Ok(vec![start, Step { instructions, packets: Some(BURST), ..Step::named("forward") }])
}

/// Median ticks of a poll that moves a full burst in one direction.
fn full_polls(generator: &mut Side, forwarder: &mut Side) -> Result<u64> {
    let (stop, counts) = (StopFlag::new(), <[PairCounts; 2]>::default());
    let (mut full, mut polls) = (Vec::new(), 0);
    let (mut since, mut before, mut sent) = (None, 0, 0);
    let mut cache = forwarder.cache();
    let lanes = forward_any(forwarder.lanes(), &mut cache, &counts, None, &stop, || {
        let now = Tsc::now();
        let received = counts[0].received.get();
        if let Some(since) = since.filter(|_| received - before == BURST) {
            full.push(now - since);
        }
        polls += 1;
        if full.len() >= SAMPLES || polls >= PATIENCE {
            stop.set();
        }
        generator.drain();
        if received == sent || polls % RESEND == 0 {
            generator.send_burst();
            sent = received + BURST;
            std::thread::sleep(ARRIVAL);
        }
        before = received;
        since = Some(Tsc::now());
    });
    drop(cache);
    forwarder.take_back(lanes);
    let reading = (0..SAMPLES).map(|_| Tsc::now().abs_diff(Tsc::now())).collect();
    match (median(full), median(reading)) {
        (Some(full), Some(reading)) => Ok(full.saturating_sub(reading)),
        _ => Err(Error::new(
            ErrorKind::Unavailable,
            "cannot count the instructions of forwarding",
            format!("no full burst came in {PATIENCE} polls"),
        )
        .mend("see that the first two and the last two NICs are connected")),
    }
}

/// The value in the middle: an interrupt falls into some polls.
fn median(mut ticks: Vec<u64>) -> Option<u64> {
    ticks.sort_unstable();
    ticks.get(ticks.len() / 2).copied()
}
