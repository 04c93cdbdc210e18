//! Ports of drivers from other crates. Each call goes through a pointer, once per burst; otherwise these
//! ports behave like those of this crate.

use std::any::Any;
use std::fmt::Debug;
use std::os::fd::BorrowedFd;
use std::sync::Arc;

use vireo_eal::dma::{Burst, DmaMemory, PoolCache};
use vireo_eal::{Error, ErrorKind, Result};

use crate::counters::{PortCounters, QueueCounters};
use crate::handover::HandOver;
use crate::port::{
    Capabilities, Link, MacAddr, Nic, Offloads, PortConfig, Queues, RxBurst, TxBurst, queues_of_another,
};

/// Requirements on a port of a driver from another crate.
pub trait ForeignNic: Nic<Rx: Debug + 'static, Tx: Debug + 'static> + Debug + Send + 'static {}

impl<N: Nic<Rx: Debug + 'static, Tx: Debug + 'static> + Debug + Send + 'static> ForeignNic for N {}

/// A port of any driver from another crate.
pub type Device = Box<dyn AnyNic>;

/// A port with type-erased queues.
pub trait AnyNic: Nic<Rx = RxQueue, Tx = TxQueue> + Debug + Send {}

impl<N: ForeignNic> AnyNic for Erased<N> {}

/// Erases the driver type of a port.
pub fn erase<N: ForeignNic>(nic: N) -> Device {
    Box::new(Erased(nic))
}

/// RX queue of any driver from another crate.
#[derive(Debug)]
pub struct RxQueue(Box<dyn AnyRx>);

/// TX queue of any driver from another crate.
#[derive(Debug)]
pub struct TxQueue(Box<dyn AnyTx>);

trait AnyRx: RxBurst + Debug {
    fn into_any(self: Box<Self>) -> Box<dyn Any>;
}

impl<R: RxBurst + Debug + 'static> AnyRx for R {
    fn into_any(self: Box<Self>) -> Box<dyn Any> {
        self
    }
}

trait AnyTx: TxBurst + Debug {
    fn into_any(self: Box<Self>) -> Box<dyn Any>;
}

impl<T: TxBurst + Debug + 'static> AnyTx for T {
    fn into_any(self: Box<Self>) -> Box<dyn Any> {
        self
    }
}

impl RxBurst for RxQueue {
    #[inline]
    fn rx_burst(&mut self, cache: &mut PoolCache, burst: &mut Burst) {
        self.0.rx_burst(cache, burst);
    }

    fn counters(&self) -> &QueueCounters {
        self.0.counters()
    }

    fn event(&self) -> Option<BorrowedFd<'_>> {
        self.0.event()
    }

    fn arm(&mut self) -> bool {
        self.0.arm()
    }

    fn disarm(&mut self) {
        self.0.disarm();
    }
}

impl TxBurst for TxQueue {
    #[inline]
    fn tx_burst(&mut self, cache: &mut PoolCache, burst: &mut Burst) -> usize {
        self.0.tx_burst(cache, burst)
    }

    fn counters(&self) -> &QueueCounters {
        self.0.counters()
    }

    fn offloads(&self) -> Offloads {
        self.0.offloads()
    }
}

#[derive(Debug)]
struct Erased<N>(N);

impl<N: ForeignNic> Nic for Erased<N> {
    type Rx = RxQueue;
    type Tx = TxQueue;

    fn start(
        &mut self,
        config: &PortConfig,
        memory: &Arc<DmaMemory>,
        cache: &mut PoolCache,
    ) -> Result<Queues<RxQueue, TxQueue>> {
        // A driver that does not know segments would send each one as a frame, and one that does not know
        // offloads would ignore them silently.
        if let Some(why) = config.unsupported_reason(&self.0.capabilities()) {
            return Err(Error::new(ErrorKind::Usage, "cannot start the port", why));
        }
        let Queues { rx, tx } = self.0.start(config, memory, cache)?;
        Ok(Queues {
            rx: rx.into_iter().map(|queue| RxQueue(Box::new(queue))).collect(),
            tx: tx.into_iter().map(|queue| TxQueue(Box::new(queue))).collect(),
        })
    }

    fn stop(&mut self, queues: Queues<RxQueue, TxQueue>, cache: &mut PoolCache) -> Result<()> {
        let own = queues.try_map(
            |rx| Some(*rx.0.into_any().downcast().ok()?),
            |tx| Some(*tx.0.into_any().downcast().ok()?),
        );
        self.0.stop(own.ok_or_else(queues_of_another)?, cache)
    }

    fn retry_stop(&mut self, cache: &mut PoolCache) -> Result<()> {
        self.0.retry_stop(cache)
    }

    fn update_memory(&mut self, memory: &DmaMemory) -> Result<()> {
        self.0.update_memory(memory)
    }

    fn mac(&self) -> MacAddr {
        self.0.mac()
    }

    fn capabilities(&self) -> Capabilities {
        self.0.capabilities()
    }

    fn pad_short_frames(&mut self) {
        self.0.pad_short_frames();
    }

    fn link(&self) -> Link {
        self.0.link()
    }

    fn link_event(&self) -> Option<BorrowedFd<'_>> {
        self.0.link_event()
    }

    fn check(&mut self) -> Result<()> {
        self.0.check()
    }

    fn set_promiscuous(&mut self, on: bool) -> Result<()> {
        self.0.set_promiscuous(on)
    }

    fn counters(&self) -> &PortCounters {
        self.0.counters()
    }
}

/// A driver of another crate cannot hand over.
impl HandOver for dyn AnyNic {}

#[cfg(test)]
mod tests {
    use vireo_eal::bdf::Bdf;
    use vireo_eal::dma::Pool;
    use vireo_eal::mem::{Backing, Region};

    use super::*;
    use crate::e1000;
    use crate::fakedev::e1000::{FakeE1000, ID_82574L};

    const CONFIG: PortConfig = PortConfig::with_descriptors(64, 64);
    const OWN: MacAddr = MacAddr([2, 0, 0, 0, 0, 1]);

    #[test]
    fn a_port_whose_driver_is_forgotten_sends_and_takes_only_its_own_queues_back() {
        let (function, nic) = FakeE1000::new(Bdf::new(0, 0, 3, 0).unwrap(), ID_82574L, OWN);
        let mut port = erase(e1000::Device::probe(function).unwrap());
        assert_eq!(port.mac(), OWN);
        let region = Region::new(Pool::bytes(256) + (64 << 10), Backing::SmallPages).unwrap();
        let memory = DmaMemory::map(region, &[]).unwrap();
        nic.attach(memory.device_view().unwrap());
        let mut cache = Pool::new(&memory, 256).unwrap().cache();
        let longer = CONFIG.with_max_frame(port.capabilities().max_frame + 1);
        let error = port.start_pair(&longer, &memory, &mut cache).unwrap_err();
        assert!(error.to_string().starts_with("cannot start the port: frames of"), "{error}");
        let (rx, mut tx) = port.start_pair(&CONFIG, &memory, &mut cache).unwrap();
        let mut packet = cache.allocate().unwrap().with_len(60);
        cache.write(&mut packet, 0, &[7; 60]);
        let mut burst: Burst = [packet].into_iter().collect();
        assert_eq!((tx.tx_burst(&mut cache, &mut burst), tx.counters().packets.get()), (1, 1));
        assert_eq!(nic.transmitted(), [vec![7; 60]]);

        /// A queue that belongs to no driver.
        #[derive(Debug)]
        struct Other(QueueCounters);
        impl RxBurst for Other {
            fn rx_burst(&mut self, _cache: &mut PoolCache, _burst: &mut Burst) {}
            fn counters(&self) -> &QueueCounters {
                &self.0
            }
        }
        let error =
            port.stop_pair(RxQueue(Box::new(Other(QueueCounters::default()))), tx, &mut cache).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Usage);
        drop(rx);
    }
}
