//! State of a port as a record, by which another process continues the port while its device runs.
//!
//! ```text
//! predecessor                            successor
//! facts ───────────────────────────────> attach     no access to the device
//! lcores return the queues
//! record, rx_record, tx_record ────────> resume     queues, to be polled at once
//! leave
//! ```
//!
//! A secondary process attaches in the same way, but to all of the port and to none of its queues. Single queues pass
//! between it and its primary:
//!
//! ```text
//! primary                                secondary
//! facts, PortRecord::without_queues ───> attach, resume, leave
//! rx_record, lend_rx, ... ─────────────> take_back_rx, ...
//! take_back_rx, ... <─────────────────── rx_record, lend_rx, ...
//! ```
//!
//! The successor allocates the rings as a start does, in the same memory and in the same order. A ring whose place
//! differs from the one that the device knows is refused, so programs that allocate differently cannot continue each
//! other's ports.

use std::sync::Arc;

use postcard_schema::Schema;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use vireo_bus_pci::Function;
use vireo_eal::dma::{DmaMemory, FreeBuffers, PoolCache};
use vireo_eal::handover::{Fds, ReceivedFds, decode};
use vireo_eal::{Error, ErrorKind, Result};

use crate::counters::CountersRecord;
use crate::driver::{Args, Facts, unsupported};
use crate::port::{Nic, PortConfig, QueuesOf};

/// A port that may pass to another process while its device runs. By default, it may not.
pub trait HandOver: Nic {
    /// Returns the PCI function of the port; `None` if it has none.
    fn function(&self) -> Option<&dyn Function> {
        None
    }

    /// Returns what another process needs to [attach](HandOver::attach) to the device of this port, with its
    /// descriptors in `fds`.
    ///
    /// # Errors
    /// `Unavailable` when the driver cannot hand over.
    fn facts<'a>(&'a self, _fds: &mut Fds<'a>) -> Result<Vec<u8>> {
        Err(unsupported())
    }

    /// Attaches to the device of `function`, which runs for another process, with devargs as for
    /// [`PciDriver::open`](crate::driver::PciDriver::open) and that process's [`facts`](HandOver::facts). Touches
    /// nothing: [`resume`](HandOver::resume) then continues the port, or [`Nic::start`] resets it.
    ///
    /// # Errors
    /// `Protocol` when the facts are not of this driver; `Unavailable` when it cannot take over.
    fn attach(_function: Box<dyn Function>, _args: Args<'_>, _facts: Facts<'_>) -> Result<Self>
    where
        Self: Sized,
    {
        Err(unsupported())
    }

    /// Returns the state of the started port, without its queues, with its descriptors in `fds`. From now until
    /// [`HandOver::keep`] or [`HandOver::leave`], the port touches nothing by itself.
    ///
    /// # Errors
    /// As for [`HandOver::facts`]; `Busy` when a later attempt may succeed.
    fn record(&self, _fds: &mut Fds<'_>) -> Result<Vec<u8>> {
        Err(unsupported())
    }

    /// Returns the state of an RX queue, which no lcore polls.
    ///
    /// # Errors
    /// `Unavailable` when the driver cannot hand over, or the queue waits for a restart of its port.
    fn rx_record(&self, _rx: &Self::Rx) -> Result<Vec<u8>> {
        Err(unsupported())
    }

    /// Returns the state of a TX queue, as [`HandOver::rx_record`] does.
    ///
    /// # Errors
    /// As for [`HandOver::rx_record`].
    fn tx_record(&self, _tx: &Self::Tx) -> Result<Vec<u8>> {
        Err(unsupported())
    }

    /// Lends an RX queue to another process, which continues it from its [record](HandOver::rx_record). The queue forgets
    /// its buffers: they return to `cache`, whose pool this process does not use until the queue is back. Until then,
    /// nobody polls the queue here.
    ///
    /// # Errors
    /// As for [`HandOver::facts`].
    fn lend_rx(&self, _rx: &mut Self::Rx, _cache: &mut PoolCache) -> Result<()> {
        Err(unsupported())
    }

    /// Lends a TX queue, as [`HandOver::lend_rx`] does.
    ///
    /// # Errors
    /// As for [`HandOver::lend_rx`].
    fn lend_tx(&self, _tx: &mut Self::Tx, _cache: &mut PoolCache) -> Result<()> {
        Err(unsupported())
    }

    /// Continues an RX queue from the record of the process that has had it. Its buffers are claimed from `free`.
    ///
    /// # Errors
    /// `Protocol` when the record contradicts the queue; the queue is still lent then.
    fn take_back_rx(&self, _rx: &mut Self::Rx, _record: &[u8], _free: &mut FreeBuffers) -> Result<()> {
        Err(unsupported())
    }

    /// Continues a TX queue, as [`HandOver::take_back_rx`] does.
    ///
    /// # Errors
    /// As for [`HandOver::take_back_rx`].
    fn take_back_tx(&self, _tx: &mut Self::Tx, _record: &[u8], _free: &mut FreeBuffers) -> Result<()> {
        Err(unsupported())
    }

    /// Makes the device stop using an RX queue, by its number, whose process has died. The other queues go on.
    ///
    /// # Errors
    /// `Unavailable` when only a reset of the device stops a queue; `Protocol` when the device does not confirm it.
    fn halt_rx(&mut self, _number: u16) -> Result<()> {
        Err(needs_reset())
    }

    /// Makes the device stop using a TX queue, as [`HandOver::halt_rx`] does.
    ///
    /// # Errors
    /// As for [`HandOver::halt_rx`].
    fn halt_tx(&mut self, _number: u16) -> Result<()> {
        Err(needs_reset())
    }

    /// Starts an RX queue that is [halted](HandOver::halt_rx) and [lent](HandOver::lend_rx) anew, with buffers from
    /// `cache`.
    ///
    /// # Errors
    /// As for [`HandOver::halt_rx`]; `Os` when there are too few buffers. The port must be restarted then.
    fn renew_rx(&mut self, _number: u16, _rx: &mut Self::Rx, _cache: &mut PoolCache) -> Result<()> {
        Err(needs_reset())
    }

    /// Starts a TX queue anew, as [`HandOver::renew_rx`] does.
    ///
    /// # Errors
    /// As for [`HandOver::renew_rx`].
    fn renew_tx(&mut self, _number: u16, _tx: &mut Self::Tx) -> Result<()> {
        Err(needs_reset())
    }

    /// Returns why a queue of this process needs a restart of the port, once. [`Nic::check`] includes that, but a
    /// secondary process must not touch the device.
    fn take_fault(&mut self) -> Option<&'static str> {
        None
    }

    /// Continues a port that another process has started, on its device, which runs on. See
    /// [`PortRecord::resume_on`].
    ///
    /// # Errors
    /// `Protocol` when the record contradicts this process's memory or configuration. The device was not touched, but
    /// buffers may be lost to the pool.
    fn resume(&mut self, _resume: Resume<'_>) -> Result<QueuesOf<Self>> {
        Err(unsupported())
    }

    /// Keeps the started port: the other process does not continue it, or has left it to this one.
    fn keep(&mut self) {}

    /// Leaves the started port to another process, which continues it. From now on, nothing touches the device: neither
    /// this value nor its drop. The memory stays as it is until the process ends.
    fn leave(&mut self) {}
}

/// State of a started port whose queues no lcore polls.
#[derive(Clone, Debug, Serialize, Deserialize, Schema)]
pub struct PortRecord {
    device: Vec<u8>,
    /// Of each queue; `None` if another process polls it.
    rx: Vec<Option<Vec<u8>>>,
    tx: Vec<Option<Vec<u8>>>,
    /// Length of the longest frame in bytes, by which the device and its rings are set up.
    max_frame: u32,
    counters: CountersRecord,
}

impl PortRecord {
    /// Describes `port`, which was started with `config` and has these `queues`, with its descriptors in `fds`.
    ///
    /// # Errors
    /// `Unavailable` when its driver cannot hand it over, or when a queue waits for a restart of the port.
    pub fn of<N: HandOver>(
        port: &N,
        queues: &QueuesOf<N>,
        config: &PortConfig,
        fds: &mut Fds<'_>,
    ) -> Result<Self> {
        Ok(Self {
            device: port.record(fds)?,
            rx: queues.rx.iter().map(|rx| port.rx_record(rx).map(Some)).collect::<Result<_>>()?,
            tx: queues.tx.iter().map(|tx| port.tx_record(tx).map(Some)).collect::<Result<_>>()?,
            max_frame: config.max_frame as u32,
            counters: port.counters().record(),
        })
    }

    /// Describes `port`, which was started with `config`, for a secondary process, which gets its queues later and counts
    /// for itself.
    ///
    /// # Errors
    /// `Unavailable` when its driver cannot share it.
    pub fn without_queues(port: &impl HandOver, config: &PortConfig, fds: &mut Fds<'_>) -> Result<Self> {
        Ok(Self {
            device: port.record(fds)?,
            rx: vec![None; config.rx_queues.into()],
            tx: vec![None; config.tx_queues.into()],
            max_frame: config.max_frame as u32,
            counters: CountersRecord::default(),
        })
    }

    /// Continues the port on `port`, which is [attached](HandOver::attach) to its device, and its counters. `fds` came
    /// with the record.
    ///
    /// # Errors
    /// `Busy` when `config` has another longest frame; otherwise as for [`HandOver::resume`].
    pub fn resume_on<N: HandOver>(
        &self,
        port: &mut N,
        config: &PortConfig,
        memory: &Arc<DmaMemory>,
        free: &mut FreeBuffers,
        fds: &ReceivedFds,
    ) -> Result<QueuesOf<N>> {
        if self.max_frame as usize != config.max_frame {
            let why =
                format!("its frames have up to {} bytes, but these {}", self.max_frame, config.max_frame);
            return Err(differs(&why));
        }
        let queues = port.resume(Resume { config, memory, free, fds, record: self })?;
        port.counters().restore(&self.counters);
        Ok(queues)
    }
}

/// What [`HandOver::resume`] needs.
#[derive(Debug)]
pub struct Resume<'a> {
    /// Configuration with which the predecessor has started the port.
    pub config: &'a PortConfig,
    /// Memory with which it has started the port, as this process has mapped it.
    pub memory: &'a Arc<DmaMemory>,
    /// Buffers that the port's rings claim.
    pub free: &'a mut FreeBuffers,
    /// Descriptors that [`HandOver::record`] has added.
    pub fds: &'a ReceivedFds,
    /// The predecessor's records.
    record: &'a PortRecord,
}

impl Resume<'_> {
    /// What [`HandOver::record`] returned.
    ///
    /// # Errors
    /// As for [`decode`].
    pub fn device<T: DeserializeOwned + Schema>(&self) -> Result<T> {
        decode(&self.record.device)
    }

    /// What [`HandOver::rx_record`] returned for each RX queue; `None` if another process polls the queue. A queue without a
    /// record is as after [`HandOver::lend_rx`].
    ///
    /// # Errors
    /// As for [`decode`]; `Protocol` when there are not as many as are configured.
    pub fn rx<T: DeserializeOwned + Schema>(&self) -> Result<Vec<Option<T>>> {
        all(&self.record.rx, self.config.rx_queues)
    }

    /// What [`HandOver::tx_record`] returned for each TX queue.
    ///
    /// # Errors
    /// As for [`Resume::rx`].
    pub fn tx<T: DeserializeOwned + Schema>(&self) -> Result<Vec<Option<T>>> {
        all(&self.record.tx, self.config.tx_queues)
    }
}

fn all<T: DeserializeOwned + Schema>(records: &[Option<Vec<u8>>], count: u16) -> Result<Vec<Option<T>>> {
    if records.len() != usize::from(count) {
        let why = format!("it has {} queues, but {count} are asked for", records.len());
        return Err(contradiction(&why));
    }
    records.iter().map(|record| record.as_deref().map(decode).transpose()).collect()
}

/// Error of a port whose record does not fit.
pub(crate) fn contradiction(why: &str) -> Error {
    Error::new(ErrorKind::Protocol, "cannot continue a port of the running program", why)
}

/// Error of a device whose queues stop only with it.
pub(crate) fn needs_reset() -> Error {
    let why = "only a reset of the device stops a queue";
    Error::new(ErrorKind::Unavailable, "cannot restart a single queue", why)
}

/// Refuses a receive filter that is not the running device's.
pub(crate) fn check_filter(is_promiscuous: bool, asked: bool) -> Result<()> {
    if is_promiscuous == asked {
        return Ok(());
    }
    let why = if is_promiscuous { "it receives every frame (-P)" } else { "it receives only its own frames" };
    Err(differs(why))
}

/// Error of a port that the running program uses in another way.
fn differs(why: &str) -> Error {
    Error::new(ErrorKind::Busy, "cannot use a port of the running program", why)
        .with_hint("give both the same arguments")
}

#[cfg(test)]
mod tests;
