//! A run with an external generator: the forwarder alone, on two NICs.

use vireo_bus_pci::{Bus, PciInfo};
use vireo_eal::clock::Tsc;
use vireo_eal::lcore::StopFlag;
use vireo_eal::vfio::VfioMode;
use vireo_eal::{Error, ErrorKind, Result};

use super::side::Counters;
use super::{FIRST_PACKET, Limits, forward, millis};
use crate::machine::Watch;
use crate::record::Run;

/// A point in time, and the number of packets forwarded by then.
#[derive(Clone, Copy)]
struct Mark {
    ticks: u64,
    sent: u64,
}

/// Runs one mode. The rate is measured for the length of a stream, from the first packet on. Only the
/// generator knows the latency and what was lost before it reached a NIC.
pub(super) fn measure(
    bus: &Bus,
    nic: &str,
    inner: &[PciInfo; 2],
    mode: VfioMode,
    limits: &Limits<'_>,
    stop: &StopFlag,
) -> Result<Run> {
    let watch = Watch::begin();
    let done = StopFlag::new();
    let stream = Tsc::from_nanos(limits.stream.as_nanos() as u64);
    let patience = Tsc::from_nanos(FIRST_PACKET.as_nanos() as u64);
    let began = Tsc::now();
    let (mut polling, mut first, mut last) = (None, None::<Mark>, None::<Mark>);
    let mut each_poll = |counters: &Counters| {
        let mark =
            Mark { ticks: Tsc::now(), sent: counters.tx.iter().map(|queue| queue.packets.get()).sum() };
        let since = *polling.get_or_insert(mark.ticks);
        if mark.sent > 0 {
            first.get_or_insert(mark);
        }
        let (from, time) = first.map_or((since, patience), |first| (first.ticks, stream));
        if stop.is_set() || mark.ticks.saturating_sub(from) >= time {
            last.get_or_insert(mark);
            done.set();
        }
    };
    let forwarded = forward(bus, inner, mode, limits, &done, &mut each_poll)?;
    let (Some(first), Some(last)) = (first, last) else {
        return Err(Error::new(
            ErrorKind::Unavailable,
            format!("no packet arrived at {} or {}", inner[0].address, inner[1].address),
            format!("the external generator sent nothing within {} s", FIRST_PACKET.as_secs()),
        )
        .with_hint("start the generator first, and keep it sending until the recording ends"));
    };
    let (received, sent) = (forwarded.received, forwarded.sent);
    let run = forwarded.into_run(nic, mode);
    let seconds = millis(last.ticks - first.ticks) / 1e3;
    let full = run.drops.get("forwarder_tx_full").copied().unwrap_or_default();
    Ok(Run {
        forward_pps: (last.sent - first.sent) as f64 / seconds.max(1e-9),
        first_packet_ms: millis(first.ticks.saturating_sub(began)),
        // Packets that a NIC lost before the forwarder received them were sent as well.
        sent: received + run.dropped() - full,
        received: sent,
        machine: Some(watch.end()),
        ..run
    })
}
