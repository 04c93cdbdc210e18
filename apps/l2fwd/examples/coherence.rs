//! The workload whose memory accesses `vireo-vfio-bench coherence` traces: a forwarder on a virtio-user port, and
//! at the other end a vhost port that sends back what it receives. One thread runs both ends in turn, and each
//! end maps their memory for itself.
//!
//! Usage: `coherence BURST rewritten|unchanged tied|general`. Prints a line of JSON: the number of packets
//! that count, the address of a word that is written before and after their rounds, and the mappings of this
//! process.
#![forbid(unsafe_code)]

use std::fs::read_to_string;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use serde_json::json;
use vireo_drivers::driver::Vdev;
use vireo_drivers::port::{Nic, PortConfig, TxBurst};
use vireo_drivers::virtio::UserOptions;
use vireo_drivers::{vhost, virtio};
use vireo_eal::dma::{Burst, DmaMemory, Pool, PoolCache};
use vireo_eal::lcore::StopFlag;
use vireo_eal::mem::{Backing, Region};
use vireo_eal::{Error, ErrorKind, Result};
use vireo_frame::forward::{Lane, forward};
use vireo_frame::tied::TiedLanes;
use vireo_l2fwd::rewrite::Rewrite;

const CONFIG: PortConfig = PortConfig::with_descriptors(256, 256);
const BUFFERS: u32 = 1024;
/// Length of each packet in bytes.
const LENGTH: usize = 60;
/// Packets that pass before those that count, and packets that count: whole turns of the ring.
const PACKETS: usize = 1024;

/// Written before and after the rounds that count.
static MARK: AtomicU32 = AtomicU32::new(0);

/// A port and its queues.
type Started<N> = (N, <N as Nic>::Rx, <N as Nic>::Tx);

type VirtioLane = Lane<virtio::RxQueue, virtio::TxQueue, Rewrite>;

/// The forwarder's lane on its path.
enum Forwarder {
    Tied(TiedLanes<virtio::RxQueue, virtio::TxQueue, Rewrite>),
    General(Vec<VirtioLane>),
}

impl Forwarder {
    /// Polls twice, because packets wait for others until a poll finds none.
    fn poll(&mut self, cache: &mut PoolCache, once: &StopFlag) {
        for _ in 0..2 {
            match self {
                Self::Tied(lanes) => lanes.forward(cache, once, &mut (), || ()),
                Self::General(lanes) => forward(lanes, &mut [Burst::new()], cache, once, &mut (), || ()),
            }
        }
    }
}

fn memory() -> Result<(Arc<DmaMemory>, PoolCache)> {
    let len = (Pool::bytes(BUFFERS) + (256 << 10)).next_multiple_of(4096);
    let memory = DmaMemory::map(Region::new(len, Backing::SmallPages)?, &[])?;
    let cache = Pool::new(&memory, BUFFERS)?.cache();
    Ok((memory, cache))
}

/// Opens and starts the port that `V` describes, at the socket that `key` names.
fn start<V: Vdev<Device: Nic>>(
    name: &str,
    (key, socket): (&str, &str),
    memory: &Arc<DmaMemory>,
    cache: &mut PoolCache,
) -> Result<Started<V::Device>> {
    let options = V::parse(name, &[(key.to_owned(), socket.to_owned())])?;
    let mut device = options.open(name, &StopFlag::new())?;
    let (rx, tx) = device.start_pair(&CONFIG, memory, cache)?;
    Ok((device, rx, tx))
}

fn main() -> Result<()> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let usage = || {
        let usage = "coherence BURST rewritten|unchanged tied|general";
        Error::new(ErrorKind::Usage, "cannot read the arguments", "they are not as expected").with_hint(usage)
    };
    let [burst, addresses, path] = args.as_slice() else { return Err(usage()) };
    let burst: usize = burst.parse().map_err(|_| usage())?;

    let directory = tempfile::tempdir().map_err(|error| Error::io("cannot create a directory", &error))?;
    let socket = directory.path().join("socket").display().to_string();
    let ((far_memory, mut far), (near_memory, mut near)) = (memory()?, memory()?);
    let (_vhost, rx, tx) = start::<vhost::Options>("net_vhost0", ("iface", &socket), &far_memory, &mut far)?;
    let mut echo = [Lane { rx, from: 0, tx, to: 0, hook: Rewrite::NONE }];
    let (user, rx, tx) =
        start::<UserOptions>("net_virtio_user0", ("path", &socket), &near_memory, &mut near)?;
    let hook = if addresses == "rewritten" { Rewrite::of(0, user.mac()) } else { Rewrite::NONE };
    let lane = Lane { rx, from: 0, tx, to: 0, hook };
    let mut forwarder = match path.as_str() {
        "tied" => Forwarder::Tied(TiedLanes::new(vec![lane], &mut near)),
        _ => Forwarder::General(vec![lane]),
    };

    let maps =
        read_to_string("/proc/self/maps").map_err(|error| Error::io("cannot read the mappings", &error))?;
    println!("{}", json!({ "packets": PACKETS, "mark": (&raw const MARK).addr(), "maps": maps }));
    let once = StopFlag::new();
    once.set();
    let mut packets: Burst =
        (0..burst).filter_map(|_| far.allocate()).map(|packet| packet.with_len(LENGTH)).collect();
    echo[0].tx.tx_burst(&mut far, &mut packets);
    let mut rounds = || {
        for _ in 0..PACKETS / burst {
            forwarder.poll(&mut near, &once);
            forward(&mut echo, &mut [Burst::new()], &mut far, &once, &mut (), || ());
        }
    };
    rounds();
    MARK.store(1, Ordering::SeqCst);
    rounds();
    MARK.store(2, Ordering::SeqCst);
    let received = user.counters().rx(0).read();
    assert_eq!(received.packets, 2 * PACKETS as u64, "packets were lost");
    assert_eq!(received.tied - received.untied, u64::from(path == "tied"));
    Ok(())
}
