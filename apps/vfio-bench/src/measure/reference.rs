//! Measures a run with a reference in place of the forwarder.

use std::sync::OnceLock;
use std::sync::atomic::AtomicU64;
use std::time::Duration;

use vireo_bus_pci::Bus;
use vireo_eal::Result;
use vireo_eal::lcore::{StopFlag, pin_to};
use vireo_eal::vfio::VfioMode;
use vireo_pktgen::generator::Stream;

use super::side::{Side, Stopped};
use super::{FIRST_PACKET, Generated, Limits, WINDOW, Wiring, counts, generate, silent};
use crate::record::{Latency, Run};
use crate::reference::Reference;
use crate::testpmd::TestpmdArgs;

/// Longest wait until the reference forwards: as long as links need to come up.
const PATIENCE: Duration = Duration::from_secs(20);

/// Measures one reference on one wiring. `mode` is the generator's mode. The start of the reference is not
/// measured. Disturbances are not recorded, because they affect no mode.
pub(crate) fn measure_reference(
    bus: &Bus,
    wiring: &Wiring,
    (reference, testpmd): (Reference, &TestpmdArgs),
    mode: VfioMode,
    limits: &Limits<'_>,
    stop: &StopFlag,
) -> Result<Run> {
    pin_to(limits.generator)?;
    let mut forwarder = reference.start(bus, &wiring.inner, limits.forwarder, testpmd)?;
    let mut side = Side::start(bus, [&wiring.sender, &wiring.receiver], mode, true)?;
    forwarder.await_forwarding()?;
    let receiver = side.macs[1];
    let addressed = |stream: Stream| {
        // A bridge also delivers broadcast frames to the host. It only forwards frames for other addresses.
        if forwarder.keeps_addresses() {
            Stream { destination: receiver, expect: None, ..stream }
        } else {
            stream
        }
    };
    // Frames lost before the reference forwards do not count as lost, and their number is not limited.
    let probes = addressed(side.probes(u64::MAX, PATIENCE));
    let first = addressed(side.probes(WINDOW, FIRST_PACKET));
    let outcome = side.send(&probes, stop)?;
    if outcome.first.is_none() {
        return Err(silent(&wiring.inner, outcome.sent));
    }
    forwarder.begin();
    let generated = generate(wiring, &mut side, first, limits, stop, &AtomicU64::new(1), &OnceLock::new())?;
    let Stopped { ports, drops, .. } = side.stop("generator")?;
    drop(ports);
    let Generated { sent, received, forward_pps, throughput, latency, .. } = generated;
    let counted: u64 = drops.values().sum();
    let lost = forwarder.stop(sent.saturating_sub(received + counted))?;
    Ok(Run {
        nic: wiring.nic.to_owned(),
        mode: reference.name().to_owned(),
        pair: Run::REFERENCE.to_owned(),
        forward_pps,
        throughput,
        latency_ns: Latency::from(&latency),
        latency_counts: counts(&latency),
        sent,
        received,
        drops: lost.into_iter().chain(drops).collect(),
        ..Run::default()
    })
}
