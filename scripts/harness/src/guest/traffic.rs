//! l2fwd on the forwarder's NICs, and pktgen that sends through it from the generator's NICs.

use anyhow::{Result, ensure};

use super::machine::{Nic, Role};
use crate::case::Context;
use crate::l2fwd::{Ended, L2fwd, Start};
use crate::pktgen::{Pktgen, Stream};
use crate::process::PATIENCE;

/// Number of frames: enough to go around the rings of 1024 several times.
pub(crate) const COUNT: u64 = 6_000;

/// Argument of pktgen for streams whose order is checked: frames in flight. With twice as many, an RX ring of 256
/// descriptors would run out of buffers, see [`Stream::intact`].
pub(crate) const WINDOW: &str = "--window 96";

/// Seconds for which a stream would last if the case did not end it.
const LONG: u64 = 100_000;

/// `-a` arguments for the forwarder's two ports.
pub(crate) fn ports(rx: Nic, tx: Nic) -> String {
    format!("-a {} -a {}", rx.bdf(Role::FwdRx), tx.bdf(Role::FwdTx))
}

/// Start of l2fwd on two NICs, on core 1, in `mode`, as most cases use it.
pub(crate) fn forwarder(mode: &str, rx: Nic, tx: Nic) -> Start {
    Start::new(format!("-l 1 --vfio-mode {mode} {} -- -p 3 -q 2 -T 0", ports(rx, tx)))
}

/// Start of l2fwd on one e1000e, for cases that are not about packets.
pub(crate) fn one_port(mode: &str) -> Start {
    Start::new(format!("-l 1 --vfio-mode {mode} -a {} -- -p 1 -T 0", Nic::E1000e.bdf(Role::FwdRx)))
}

/// Arguments of pktgen. Its `mode` works in this boot and is not the subject of the case.
fn generator(mode: &str, rx: Nic, tx: Nic, arguments: &str) -> String {
    format!(
        "-l 0 --file-prefix gen --vfio-mode {mode} -a {} -a {} -- {arguments}",
        rx.bdf(Role::GenTx),
        tx.bdf(Role::GenRx)
    )
}

/// Starts a stream that runs until the case ends it. It need not come back complete.
pub(crate) fn start_stream(context: &Context, mode: &str, nic: Nic) -> Result<Pktgen> {
    let mac = nic.mac(Role::FwdRx);
    Pktgen::spawn(context, &generator(mode, nic, nic, &format!("--dst-mac {mac} --duration {LONG}")))
}

/// As [`start_stream`], with so few frames in flight that none overtakes another.
pub(crate) fn start_ordered_stream(context: &Context, mode: &str, nic: Nic) -> Result<Pktgen> {
    let stream = format!("--dst-mac {} {WINDOW} --duration {LONG}", nic.mac(Role::FwdRx));
    Pktgen::spawn(context, &generator(mode, nic, nic, &stream))
}

/// As [`start_stream`], at a rate that does not wait for frames to come back.
pub(crate) fn start_steady_stream(context: &Context, mode: &str, nic: Nic) -> Result<Pktgen> {
    let stream =
        format!("--dst-mac {} --rate 5000 --window 100000000 --duration {LONG}", nic.mac(Role::FwdRx));
    Pktgen::spawn(context, &generator(mode, nic, nic, &stream))
}

/// Runs a stream to its end.
pub(crate) fn stream(context: &Context, mode: &str, rx: Nic, tx: Nic, arguments: &str) -> Result<Stream> {
    Pktgen::spawn(context, &generator(mode, rx, tx, arguments))?.wait(PATIENCE)
}

/// Sends [`COUNT`] frames in each direction between the generator's NICs of these kinds, through the
/// forwarder's NICs. Each frame must come back once, in order, and with the addresses that the forwarder
/// writes. Generator and forwarder number their ports alike, in the order of their addresses.
pub(crate) fn carries(context: &Context, mode: &str, rx: Nic, tx: Nic) -> Result<()> {
    carries_as(context, mode, rx, tx, WINDOW)
}

/// As [`carries`], with more arguments of pktgen.
fn carries_as(context: &Context, mode: &str, rx: Nic, tx: Nic, arguments: &str) -> Result<()> {
    let (rx_mac, tx_mac) = (rx.mac(Role::FwdRx), tx.mac(Role::FwdTx));
    for (from, to, dst, src) in [(0, 1, &rx_mac, &tx_mac), (1, 0, &tx_mac, &rx_mac)] {
        let stream = stream(
            context,
            mode,
            rx,
            tx,
            &format!(
                "--tx-port {from} --dst-mac {dst} --rx-port {to} --expect-dst 02:00:00:00:00:0{to} --expect-src {src} \
                 --count {COUNT} {arguments}"
            ),
        )?;
        stream.came_back(COUNT, COUNT)?;
        ensure!(stream.complete, "pktgen exited with 1");
    }
    Ok(())
}

/// Starts l2fwd as `start` says, and checks that it carries frames in both directions and counts them.
pub(crate) fn forwards(context: &Context, mode: &str, start: &Start, rx: Nic, tx: Nic) -> Result<Ended> {
    forwards_as(context, mode, start, rx, tx, WINDOW)
}

/// As [`forwards`], with more arguments of pktgen.
pub(crate) fn forwards_as(
    context: &Context,
    mode: &str,
    start: &Start,
    rx: Nic,
    tx: Nic,
    arguments: &str,
) -> Result<Ended> {
    let l2fwd = start.forwarding(context)?;
    carries_as(context, mode, rx, tx, arguments)?;
    let ended = l2fwd.stop()?;
    ended.counted(0, COUNT, COUNT)?;
    ended.counted(1, COUNT, COUNT)?;
    Ok(ended)
}

/// Starts l2fwd and a stream, and returns when frames pass.
pub(crate) fn under_traffic(
    context: &Context,
    mode: &str,
    generator_mode: &str,
    nic: Nic,
) -> Result<(L2fwd, Pktgen)> {
    under(context, mode, nic, || start_stream(context, generator_mode, nic))
}

/// As [`under_traffic`], with frames that are sent whether or not earlier ones came back: they fill the ring
/// of a NIC that hangs.
pub(crate) fn under_steady_traffic(
    context: &Context,
    mode: &str,
    generator_mode: &str,
    nic: Nic,
) -> Result<(L2fwd, Pktgen)> {
    under(context, mode, nic, || start_steady_stream(context, generator_mode, nic))
}

fn under(
    context: &Context,
    mode: &str,
    nic: Nic,
    generator: impl FnOnce() -> Result<Pktgen>,
) -> Result<(L2fwd, Pktgen)> {
    let start = Start::new(format!("-l 1 --vfio-mode {mode} {} -- -p 3 -q 2 -T 0.5", ports(nic, nic)));
    let mut l2fwd = start.forwarding(context)?;
    let pktgen = generator()?;
    l2fwd.await_traffic()?;
    Ok((l2fwd, pktgen))
}

/// Checks that the next start works.
pub(crate) fn starts_again(context: &Context, mode: &str) -> Result<()> {
    forwarder(mode, Nic::E1000e, Nic::E1000e).forwarding(context)?.stop()?;
    Ok(())
}

/// Checks that a start after a killed one reports the recovery, and works.
pub(crate) fn forwards_after_kill(
    context: &Context,
    mode: &str,
    generator_mode: &str,
    (rx, tx): (Nic, Nic),
) -> Result<()> {
    let l2fwd = forwarder(mode, rx, tx).forwarding(context)?;
    ensure!(l2fwd.recovered_from(None)?, "l2fwd did not report that it recovered");
    carries(context, generator_mode, rx, tx)?;
    l2fwd.stop()?;
    Ok(())
}
