//! Counts what forwarding costs on a real NIC. One thread is generator and forwarder in turn, so that neither
//! advances the other's clock.

use std::time::{Duration, Instant};

use vireo_bus_pci::Bus;
use vireo_eal::clock::{Tsc, thread_time};
use vireo_eal::dma::MAX_BURST;
use vireo_eal::lcore::StopFlag;
use vireo_eal::vfio::VfioMode;
use vireo_eal::{Error, ErrorKind, Result};
use vireo_frame::forward::{Polling, forward_any};

use super::run::{Step, measured};
use crate::measure::{Side, Wiring};

/// Number of polls of which the median is taken.
const SAMPLES: usize = 64;
/// Polls after which counting fails if the NIC delivers no frame or no full burst.
const PATIENCE: usize = 100_000;
/// Polls after which outstanding frames count as lost.
const RESEND: usize = 1000;
/// Polls per frame sent until the first one is forwarded: receiving and sending it may take a poll each.
const POLLS_PER_PROBE: usize = 4;
/// Packets in a full burst.
const BURST: u64 = MAX_BURST as u64;
/// Time to wait for frames to arrive. A device may deliver a burst in parts, and a poll that receives only
/// the last part does not move a full burst.
const ARRIVAL: Duration = Duration::from_millis(1);

/// Measures the start of the forwarder, its first packet, and a poll of both lanes that moves a full burst on
/// one of them.
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

/// Returns the ticks of the polls that forward the first packet, and how long the thread waited for it, to
/// within [`ARRIVAL`].
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
        // Drain frames that the device held back, so that they do not arrive later.
        if first.is_none() { polls < PATIENCE } else { quiet < RESEND }
    })?;
    first.ok_or_else(|| nothing_came("no frame"))
}

/// Returns the median ticks of a poll that moves a full burst in one direction.
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
    // The median leaves out polls that an interrupt lengthened.
    median(full).ok_or_else(|| nothing_came("no full burst"))
}

/// Polls both lanes of `forwarder` until `after` returns false. After each poll, `after` receives the number
/// of packets that the first lane has forwarded and the ticks that the poll took.
fn polls_of(forwarder: &mut Side, mut after: impl FnMut(u64, u64) -> bool) -> Result<()> {
    let (stop, [_, tx]) = (StopFlag::new(), forwarder.counters().tx);
    let earlier = tx.packets.get();
    let reading = median((0..SAMPLES).map(|_| Tsc::now().abs_diff(Tsc::now())).collect()).unwrap_or_default();
    let mut cache = forwarder.cache();
    let mut since = Tsc::now();
    let lanes = forward_any(forwarder.lanes()?, &mut cache, Polling::default(), &stop, || {
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
        format!("{what} arrived in {PATIENCE} polls"),
    )
    .with_hint("check that the first two and the last two NICs are connected")
}

/// Returns the middle value, or the upper one of two middle values.
fn median(mut ticks: Vec<u64>) -> Option<u64> {
    ticks.sort_unstable();
    ticks.get(ticks.len() / 2).copied()
}
