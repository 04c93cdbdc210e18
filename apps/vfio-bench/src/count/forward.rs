//! What forwarding takes on a real NIC: one thread is generator and forwarder in turn, so that no clock runs for the other.

use std::time::{Duration, Instant};

use vireo_bus_pci::Bus;
use vireo_eal::clock::{Tsc, thread_time};
use vireo_eal::dma::MAX_BURST;
use vireo_eal::lcore::StopFlag;
use vireo_eal::vfio::VfioMode;
use vireo_eal::{Error, ErrorKind, Result};
use vireo_frame::forward::forward_any;

use super::run::{Step, measured};
use crate::measure::{Side, Wiring};

/// Polls whose median counts.
const SAMPLES: usize = 64;
/// Polls after which a NIC that brings nothing, or no full burst, is given up.
const PATIENCE: usize = 100_000;
/// Polls after which frames that have not come are lost.
const RESEND: usize = 1000;
/// Polls for each frame that is sent until the first is forwarded: it may take one to receive and one to send it.
const POLLS_PER_PROBE: usize = 4;
/// Packets of a full burst.
const BURST: u64 = MAX_BURST as u64;
/// A device may bring a burst in parts, and a poll that only ends it is none that moves it.
const ARRIVAL: Duration = Duration::from_millis(1);

/// The forwarder's start, its first packet, and a poll of both its lanes that moves a full burst on one.
pub(super) fn steps(bus: &Bus, wiring: &Wiring, mode: VfioMode) -> Result<Vec<Step>> {
    let mut generator = Side::start(bus, [&wiring.sender, &wiring.receiver], mode, true)?;
    let (forwarder, start) =
        measured("start", || Side::start(bus, [&wiring.inner[0], &wiring.inner[1]], mode, false));
    let mut forwarder = forwarder?;
    let (first, waited) = first_packet(&mut generator, &mut forwarder)?;
    let poll = full_poll(&mut generator, &mut forwarder)?;
    forwarder.stop("forwarder")?;
    generator.stop("generator")?;
    let first = Step {
        instructions: start.instructions + Tsc::to_nanos(first),
        waiting: start.waiting + waited.as_nanos() as u64,
        ..Step::named("first packet")
    };
    let instructions = Tsc::to_nanos(poll);
    Ok(vec![start, first, Step { instructions, packets: Some(BURST), ..Step::named("forward") }])
}

/// Ticks of the polls that forward the first packet, and how long the thread waited for it, to [`ARRIVAL`].
fn first_packet(generator: &mut Side, forwarder: &mut Side) -> Result<(u64, Duration)> {
    let (began, worked) = (Instant::now(), thread_time());
    let (mut first, mut spent, mut polls) = (None, 0, 0);
    let (mut quiet, mut before) = (0, 0);
    polls_of(forwarder, |received, ticks| {
        generator.drain();
        spent += ticks;
        polls += 1;
        if received > 0 && first.is_none() {
            first = Some((spent, began.elapsed().saturating_sub(thread_time() - worked)));
        }
        if first.is_none() && polls % POLLS_PER_PROBE == 1 {
            generator.send_burst(1);
            std::thread::sleep(ARRIVAL);
            spent = 0;
        }
        quiet = if received == before { quiet + 1 } else { 0 };
        before = received;
        // Frames that were held back come at once, and are not to come later.
        if first.is_none() { polls < PATIENCE } else { quiet < RESEND }
    })?;
    first.ok_or_else(|| nothing_came("no frame"))
}

/// Median ticks of a poll that moves a full burst in one direction.
fn full_poll(generator: &mut Side, forwarder: &mut Side) -> Result<u64> {
    let (mut full, mut polls) = (Vec::new(), 0);
    let (mut before, mut sent) = (0, 0);
    polls_of(forwarder, |received, ticks| {
        if received - before == BURST {
            full.push(ticks);
        }
        polls += 1;
        generator.drain();
        if received == sent || polls % RESEND == 0 {
            generator.send_burst(MAX_BURST);
            sent = received + BURST;
            std::thread::sleep(ARRIVAL);
        }
        before = received;
        full.len() < SAMPLES && polls < PATIENCE
    })?;
    // An interrupt falls into some polls.
    median(full).ok_or_else(|| nothing_came("no full burst"))
}

/// Polls both lanes of `forwarder` until `after` says no. It hears after each poll how many packets the first lane has
/// forwarded, and how many ticks the poll took.
fn polls_of(forwarder: &mut Side, mut after: impl FnMut(u64, u64) -> bool) -> Result<()> {
    let (stop, [_, tx]) = (StopFlag::new(), forwarder.counters().tx);
    let earlier = tx.packets.get();
    let reading = median((0..SAMPLES).map(|_| Tsc::now().abs_diff(Tsc::now())).collect()).unwrap_or_default();
    let mut cache = forwarder.cache();
    let mut since = Tsc::now();
    let lanes = forward_any(forwarder.lanes()?, &mut cache, None, &stop, || {
        let ticks = (Tsc::now() - since).saturating_sub(reading);
        if !after(tx.packets.get() - earlier, ticks) {
            stop.set();
        }
        since = Tsc::now();
    });
    drop(cache);
    forwarder.take_back(lanes);
    Ok(())
}

fn nothing_came(what: &str) -> Error {
    Error::new(
        ErrorKind::Unavailable,
        "cannot count the instructions of forwarding",
        format!("{what} came in {PATIENCE} polls"),
    )
    .with_hint("see that the first two and the last two NICs are connected")
}

/// The value in the middle.
fn median(mut ticks: Vec<u64>) -> Option<u64> {
    ticks.sort_unstable();
    ticks.get(ticks.len() / 2).copied()
}
