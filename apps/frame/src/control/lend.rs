//! Queues that pass between a primary and its secondary processes while their devices run.

use std::collections::BTreeMap;
use std::sync::Arc;

use postcard_schema::Schema;
use serde::{Deserialize, Serialize};
use vireo_drivers::counters::{QueueCounters, QueueStats};
use vireo_drivers::handover::HandOver;
use vireo_drivers::table::Port;
use vireo_eal::dma::{FreeBuffers, PoolCache};
use vireo_eal::{Error, ErrorKind, Result};

use crate::idle::IdleQueues;
use crate::supervised::SupervisedPort;

/// Message of a secondary process to its primary.
#[derive(Debug, Serialize, Deserialize, Schema)]
pub(crate) enum Report {
    /// It has attached to the ports, and is ready to poll.
    Ready {
        /// Number of the process.
        process: u16,
        /// Number of processes that it reckons with.
        count: u16,
    },
    /// What it has counted for its queues since its own start.
    Counted(QueueCounts),
    /// It polls these queues no longer, as the primary has ordered.
    Returned(LentQueues),
    /// A device has misbehaved, for this reason, and the process has given up its queues.
    Fault(String),
    /// It polls these queues no longer, and ends.
    Left(LentQueues),
}

/// Message of a primary to a secondary process.
#[derive(Debug, Serialize, Deserialize, Schema)]
pub(crate) enum Order {
    /// Poll these queues.
    Poll(LentQueues),
    /// Tell what was counted. The primary asks again only when it has the answer, so neither process ever waits for the
    /// other one to read.
    Count,
    /// Return the queues, and wait: a port restarts.
    Return,
    /// Return the queues, and end: the primary ends.
    End,
    /// End: the process cannot share the ports, for this reason.
    Refuse(String),
}

/// Queues on their way to another process.
#[derive(Debug, Default, Serialize, Deserialize, Schema)]
pub(crate) struct LentQueues {
    rx: Vec<LentQueue>,
    tx: Vec<LentQueue>,
}

/// A queue on its way to another process.
#[derive(Debug, Serialize, Deserialize, Schema)]
pub(crate) struct LentQueue {
    /// Number of the queue pair, across all ports.
    number: u32,
    record: Vec<u8>,
}

/// Counts of queues, by direction and by number of the queue pair.
pub(crate) type QueueCounts = BTreeMap<(Direction, u32), QueueStats>;

/// Direction of a queue.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, Schema)]
pub(crate) enum Direction {
    Rx,
    Tx,
}

/// Counters of a queue, which outlive it.
pub(crate) fn counters(
    ports: &[SupervisedPort],
    queues: &IdleQueues,
    direction: Direction,
    number: usize,
) -> Option<Arc<QueueCounters>> {
    let (port, queue) = (ports.get(queues.port_of(number))?, queues.queue_of(number).into());
    Some(match direction {
        Direction::Rx => port.counters.rx(queue),
        Direction::Tx => port.counters.tx(queue),
    })
}

/// Reads the counters of the queues of lanes, given as the numbers of their pairs.
pub(crate) fn counted(
    ports: &[SupervisedPort],
    queues: &IdleQueues,
    lanes: &[(usize, usize)],
) -> QueueCounts {
    // A packet is received before it is sent, and its TX counter is read before its RX counter.
    let both = lanes.iter().flat_map(|&(from, to)| [(Direction::Tx, to), (Direction::Rx, from)]);
    both.filter_map(|(direction, number)| {
        Some(((direction, number as u32), counters(ports, queues, direction, number)?.read()))
    })
    .collect()
}

/// Lends the queues of lanes, given as the numbers of their pairs. No lcore polls them. Their buffers return to `cache`.
///
/// # Errors
/// Why a queue cannot be lent: it waits for a restart of its port. All queues stay as they are then.
pub(crate) fn lend(
    ports: &[SupervisedPort],
    queues: &mut IdleQueues,
    lanes: &[(usize, usize)],
    cache: &mut PoolCache,
) -> Result<LentQueues> {
    let mut lent = LentQueues::default();
    for &(from, to) in lanes {
        let port = port_at(ports, queues, from)?;
        let rx = queues.rx_mut(from).ok_or_else(missing)?;
        lent.rx.push(LentQueue { number: from as u32, record: port.rx_record(rx)? });
        let port = port_at(ports, queues, to)?;
        let tx = queues.tx_mut(to).ok_or_else(missing)?;
        lent.tx.push(LentQueue { number: to as u32, record: port.tx_record(tx)? });
    }
    forget(ports, queues, lanes, cache)?;
    Ok(lent)
}

/// Lends the queues of `lanes` to the primary, and returns the report on that. If there is a `fault`, or a queue cannot be
/// lent, forgets them, and reports that their ports must restart.
pub(crate) fn give_up(
    (ports, queues, lanes): (&[SupervisedPort], &mut IdleQueues, &[(usize, usize)]),
    cache: &mut PoolCache,
    fault: Option<String>,
    report: fn(LentQueues) -> Report,
) -> Report {
    let lent = match fault {
        None => lend(ports, queues, lanes, cache).map_err(|error| error.to_string()),
        Some(why) => Err(why),
    };
    lent.map_or_else(
        |why| {
            if let Err(error) = forget(ports, queues, lanes, cache) {
                tracing::error!("{error}");
            }
            Report::Fault(why)
        },
        report,
    )
}

/// Lends queues whose state nobody needs, because their ports restart.
///
/// # Errors
/// As for [`HandOver::lend_rx`].
fn forget(
    ports: &[SupervisedPort],
    queues: &mut IdleQueues,
    lanes: &[(usize, usize)],
    cache: &mut PoolCache,
) -> Result<()> {
    for &(from, to) in lanes {
        let port = port_at(ports, queues, from)?;
        port.lend_rx(queues.rx_mut(from).ok_or_else(missing)?, cache)?;
        let port = port_at(ports, queues, to)?;
        port.lend_tx(queues.tx_mut(to).ok_or_else(missing)?, cache)?;
    }
    Ok(())
}

/// Continues `lent` queues, which are those of `lanes`. Their buffers are claimed from `free`.
///
/// # Errors
/// `Protocol` when they are other queues, or contradict this process's memory.
pub(crate) fn take_back(
    ports: &[SupervisedPort],
    queues: &mut IdleQueues,
    lanes: &[(usize, usize)],
    lent: &LentQueues,
    free: &mut FreeBuffers,
) -> Result<()> {
    let is_of = |lent: &[LentQueue], number: usize| lent.iter().any(|queue| queue.number as usize == number);
    if lent.rx.len() != lanes.len()
        || lent.tx.len() != lanes.len()
        || !lanes.iter().all(|(from, to)| is_of(&lent.rx, *from) && is_of(&lent.tx, *to))
    {
        return Err(Error::new(ErrorKind::Protocol, CANNOT, "they are other queues"));
    }
    for LentQueue { number, record } in &lent.rx {
        let number = *number as usize;
        let port = port_at(ports, queues, number)?;
        port.take_back_rx(queues.rx_mut(number).ok_or_else(missing)?, record, free)?;
    }
    for LentQueue { number, record } in &lent.tx {
        let number = *number as usize;
        let port = port_at(ports, queues, number)?;
        port.take_back_tx(queues.tx_mut(number).ok_or_else(missing)?, record, free)?;
    }
    Ok(())
}

/// Starts queues anew that the process which had them has not returned, and that are [lent](lend). Their devices and all
/// other queues go on.
///
/// # Errors
/// `Unavailable` when only a reset of a device stops its queues; otherwise as for [`HandOver::renew_rx`]. The ports must
/// be restarted then.
pub(crate) fn renew(
    ports: &mut [SupervisedPort],
    queues: &mut IdleQueues,
    lanes: &[(usize, usize)],
    cache: &mut PoolCache,
) -> Result<()> {
    // The process's buffers are in all of these rings. None of them may be given out before no device reaches any.
    for &(from, to) in lanes {
        port_mut(ports, queues, from)?.halt_rx(queues.queue_of(from))?;
        port_mut(ports, queues, to)?.halt_tx(queues.queue_of(to))?;
    }
    for &(from, to) in lanes {
        let number = queues.queue_of(to);
        port_mut(ports, queues, to)?.renew_tx(number, queues.tx_mut(to).ok_or_else(missing)?)?;
        let number = queues.queue_of(from);
        port_mut(ports, queues, from)?.renew_rx(number, queues.rx_mut(from).ok_or_else(missing)?, cache)?;
    }
    Ok(())
}

const CANNOT: &str = "cannot continue the queues of another process";

fn missing() -> Error {
    Error::new(ErrorKind::Protocol, CANNOT, "a queue is missing")
}

/// Returns the port of queue pair `number`, to be changed.
fn port_mut<'a>(ports: &'a mut [SupervisedPort], queues: &IdleQueues, number: usize) -> Result<&'a mut Port> {
    let open = ports.get_mut(queues.port_of(number)).and_then(|port| port.open.as_mut());
    open.map(|open| &mut open.port).ok_or_else(missing)
}

/// Returns the port of queue pair `number`.
fn port_at<'a>(ports: &'a [SupervisedPort], queues: &IdleQueues, number: usize) -> Result<&'a Port> {
    let open = ports.get(queues.port_of(number)).and_then(|port| port.open.as_ref());
    open.map(|open| &open.port).ok_or_else(missing)
}
