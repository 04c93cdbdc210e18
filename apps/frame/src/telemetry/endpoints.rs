//! Telemetry endpoints and their answers, with DPDK's names (DPDK's `rte_ethdev_telemetry.c`, `eal_common_*.c`,
//! `rte_mempool.c`) where DPDK has the same thing.

use std::collections::BTreeMap;
use std::ops::RangeInclusive;
use std::sync::Arc;

use serde_json::{Map, Value, json};
use vireo_bus_pci::Report;
use vireo_drivers::counters::{PortCounters, PortStats, QueueStats};
use vireo_drivers::port::{Link, Nic, Offloads, PortConfig};
use vireo_eal::dma::{BUFFER_SIZE, DATA_ROOM, Pool, PoolCache};
use vireo_eal::ioctl;
use vireo_eal::mem::Region;

use crate::app::App;
use crate::counts::Counts;
use crate::ports::Ports;
use crate::status::{PortStatus, SharedStatus};

/// Endpoint of the telemetry socket.
pub(super) struct Endpoint {
    pub(super) name: &'static str,
    /// Answers a request with these parameters; `None` if the parameters are wrong.
    pub(super) answer: fn(&Facts, &str) -> Option<Value>,
    pub(super) help: &'static str,
}

const fn endpoint(
    name: &'static str,
    answer: fn(&Facts, &str) -> Option<Value>,
    help: &'static str,
) -> Endpoint {
    Endpoint { name, answer, help }
}

pub(super) const ENDPOINTS: &[Endpoint] = &[
    endpoint("/eal/app_params", app_params, "arguments of the application"),
    endpoint("/eal/lcore/info", lcore_info, "an lcore: its CPUs, NUMA node and use. Parameter: lcore"),
    endpoint("/eal/lcore/list", lcores, "ids of the lcores"),
    endpoint(
        "/eal/lcore/usage",
        lcore_usage,
        "TSC ticks of all lcores: in all, and in polls that moved packets",
    ),
    endpoint(
        "/eal/memzone_info",
        memzone_info,
        "a region of memory that devices reach, in bytes. Parameter: region",
    ),
    endpoint("/eal/memzone_list", memzones, "regions of memory that devices reach"),
    endpoint("/eal/params", eal_params, "arguments of the EAL"),
    endpoint("/ethdev/info", ethdev_info, "a port: its device, configuration and state. Parameter: port"),
    endpoint("/ethdev/link_status", link_status, "link of a port; speed in Mbit/s. Parameter: port"),
    endpoint("/ethdev/list", ethdevs, "numbers of the open ports"),
    endpoint("/ethdev/macs", macs, "MAC addresses of a port. Parameter: port"),
    endpoint("/ethdev/rx_queue", rx_queue, "an RX queue. Parameters: port,queue"),
    endpoint("/ethdev/stats", stats, "DPDK's counters of a port, and of its queues. Parameter: port"),
    endpoint("/ethdev/tx_queue", tx_queue, "a TX queue. Parameters: port,queue"),
    endpoint("/ethdev/xstats", xstats, "all counters of a port. Parameters: port[,hide_zero=true]"),
    endpoint("/iommufd/ioas", ioas_list, "I/O address spaces of iommufd, each with its ports"),
    endpoint(
        "/iommufd/maps",
        ioas_maps,
        "device addresses that an I/O address space maps. Parameter: its id",
    ),
    endpoint("/mempool/info", mempool_info, "a pool of packet buffers. Parameter: name"),
    endpoint("/mempool/list", mempools, "names of the pools of packet buffers"),
    endpoint("/ring/info", |_, _| None, "there are no rings of DPDK's kind"),
    endpoint("/ring/list", |_, _| Some(json!([])), "there are no rings of DPDK's kind"),
    endpoint("/vfio/info", vfio_info, "VFIO mode of a port and the reason for it. Parameter: port"),
    endpoint("/vfio/list", vfios, "numbers of the open ports on VFIO devices"),
    endpoint(
        "/vfio/trace",
        vfio_trace,
        "the first calls to VFIO and iommufd. Parameter: number of calls to leave out",
    ),
];

/// What the answers are made of.
#[derive(Debug)]
pub(super) struct Facts {
    /// Arguments of the process.
    arguments: Vec<String>,
    lcores: Vec<LcoreFacts>,
    counts: Counts,
    /// By port number.
    ports: Vec<PortFacts>,
    /// Pools of packet buffers, by name.
    pools: Vec<(String, Arc<Pool>)>,
    zones: Vec<Zone>,
    /// What I/O address spaces map, by their ids.
    maps: BTreeMap<u32, Vec<RangeInclusive<u64>>>,
}

#[derive(Debug)]
struct LcoreFacts {
    id: u32,
    cpus: Vec<usize>,
    node: Option<u32>,
}

/// Memory that devices reach.
#[derive(Debug)]
struct Zone {
    address: usize,
    len: usize,
    page_size: usize,
    node: Option<u32>,
}

#[derive(Debug)]
struct PortFacts {
    name: String,
    mac: String,
    node: Option<u32>,
    report: Option<Report>,
    /// Id of the port's I/O address space, if it has one of iommufd.
    ioas: Option<u32>,
    config: PortConfig,
    /// Names of the RX queues' pools, by queue number.
    pools: Vec<String>,
    counters: PortCounters,
    status: SharedStatus,
}

impl Facts {
    /// Collects the facts of started ports.
    pub(super) fn new(app: &App, ports: &Ports) -> Self {
        let lcores = &app.eal.lcores;
        let (config, open) = (ports.config(), (0..ports.count()).filter_map(|number| ports.get(number)));
        let memory = open.clone().find_map(|open| ports.memory().of(open).ok());
        let zone = |region: &Region| Zone {
            address: region.addr(),
            len: region.len(),
            page_size: region.page_size(),
            node: region.node(),
        };
        let segments = memory.iter().flat_map(|memory| memory.memory_map().segments());
        let segments: Vec<_> = segments.collect();
        let mut maps: BTreeMap<u32, Vec<_>> = BTreeMap::new();
        for mapping in segments.iter().flat_map(|segment| segment.mappings()) {
            if let (Some(ioas), Some(iovas)) = (mapping.space().ioas(), mapping.iovas()) {
                maps.entry(ioas.id()).or_default().push(iovas);
            }
        }
        let lcore = |id| LcoreFacts { id, cpus: lcores.cpus(id).to_vec(), node: lcores.node(id) };
        Self {
            arguments: std::env::args_os().map(|word| word.to_string_lossy().into_owned()).collect(),
            lcores: lcores.ids().into_iter().map(lcore).collect(),
            counts: ports.counts().clone(),
            ports: (0..ports.count()).map(|number| PortFacts::new(ports, number, config)).collect(),
            pools: ports.pools().map(|(name, pool)| (name, Arc::clone(pool))).collect(),
            zones: segments.iter().map(|segment| zone(segment.region())).collect(),
            maps,
        }
    }

    /// Finds the port whose number is the first parameter; returns its number and the other parameters. A
    /// closed port is none.
    fn port<'p>(&self, parameters: &'p str) -> Option<(usize, &PortFacts, &'p str)> {
        let (number, rest) = parameters.split_once(',').unwrap_or((parameters, ""));
        let number: usize = number.parse().ok()?;
        let port = self.ports.get(number)?;
        port.status.get().is_open.then_some((number, port, rest))
    }
}

impl PortFacts {
    fn new(ports: &Ports, number: usize, config: PortConfig) -> Self {
        let open = ports.get(number);
        let offloads = open.map(|open| open.port.capabilities().offloads).unwrap_or(Offloads::empty());
        Self {
            name: open.map(|open| open.name.clone()).unwrap_or_default(),
            mac: open.map(|open| open.port.mac().to_string()).unwrap_or_default(),
            node: open.and_then(|open| open.node),
            report: open.and_then(|open| open.report.clone()),
            ioas: open.and_then(|open| Some(open.space.as_ref()?.ioas()?.id())),
            config: config.with_offloads(config.offloads & offloads),
            pools: (0..config.rx_queues).map(|queue| ports.pool_of(number, queue)).collect(),
            counters: ports.counts().port(number).clone(),
            status: ports.status(number),
        }
    }

    /// DPDK's names of the offloads in use.
    fn offloads(&self, checksum: Offloads, several: &'static str) -> Vec<&'static str> {
        let checksums = self.config.offloads.contains(checksum).then_some(["UDP_CKSUM", "TCP_CKSUM"]);
        checksums.into_iter().flatten().chain(self.config.is_scattered().then_some(several)).collect()
    }

    fn rx_offloads(&self) -> Vec<&'static str> {
        self.offloads(Offloads::RX_CHECKSUM, "SCATTER")
    }

    fn tx_offloads(&self) -> Vec<&'static str> {
        self.offloads(Offloads::TX_CHECKSUM, "MULTI_SEGS")
    }
}

fn app_params(facts: &Facts, _: &str) -> Option<Value> {
    let mut arguments = facts.arguments.iter().skip_while(|word| *word != "--");
    arguments.next();
    Some(json!(arguments.collect::<Vec<_>>()))
}

fn eal_params(facts: &Facts, _: &str) -> Option<Value> {
    Some(json!(facts.arguments.iter().take_while(|word| *word != "--").collect::<Vec<_>>()))
}

fn lcores(facts: &Facts, _: &str) -> Option<Value> {
    Some(json!(facts.lcores.iter().map(|lcore| lcore.id).collect::<Vec<_>>()))
}

fn lcore_info(facts: &Facts, parameters: &str) -> Option<Value> {
    let wanted: u32 = parameters.parse().ok()?;
    let LcoreFacts { id, cpus, node } = facts.lcores.iter().find(|lcore| lcore.id == wanted)?;
    let mut info = json!({ "lcore_id": id, "socket": node.unwrap_or(0), "role": "RTE", "cpuset": cpus });
    if let Some(ticks) = facts.counts.lcore(*id) {
        let (total, busy) = (ticks.total(), ticks.busy.get());
        info["total_cycles"] = total.into();
        info["busy_cycles"] = busy.into();
        info["usage_ratio"] = ratio(busy, total).into();
        if ticks.sleeps.get() > 0 {
            info["asleep_cycles"] = ticks.asleep.get().into();
            info["sleeps"] = ticks.sleeps.get().into();
        }
    }
    Some(info)
}

fn lcore_usage(facts: &Facts, _: &str) -> Option<Value> {
    let used = facts.lcores.iter().filter_map(|lcore| Some((lcore.id, facts.counts.lcore(lcore.id)?)));
    let used: Vec<_> = used.map(|(id, ticks)| (id, ticks.total(), ticks.busy.get())).collect();
    Some(json!({
        "lcore_ids": used.iter().map(|(id, ..)| id).collect::<Vec<_>>(),
        "total_cycles": used.iter().map(|(_, total, _)| total).collect::<Vec<_>>(),
        "busy_cycles": used.iter().map(|(.., busy)| busy).collect::<Vec<_>>(),
        "usage_ratio": used.iter().map(|(_, total, busy)| ratio(*busy, *total)).collect::<Vec<_>>(),
    }))
}

fn ratio(busy: u64, total: u64) -> String {
    format!("{:.2}%", 100.0 * busy as f64 / total.max(1) as f64)
}

fn memzones(facts: &Facts, _: &str) -> Option<Value> {
    Some(json!((0..facts.zones.len()).collect::<Vec<_>>()))
}

fn memzone_info(facts: &Facts, parameters: &str) -> Option<Value> {
    let number: usize = parameters.parse().ok()?;
    let zone = facts.zones.get(number)?;
    let address = format!("{:#x}", zone.address);
    Some(json!({
        "Zone": number, "Name": format!("region{number}"), "Length": zone.len, "Address": address,
        "Socket": socket(zone.node), "Flags": 0, "Hugepage_size": zone.page_size, "Hugepage_base": address,
        "Hugepage_used": zone.len.div_ceil(zone.page_size),
    }))
}

/// A NUMA node as DPDK has it: -1 stands for any (`SOCKET_ID_ANY`).
fn socket(node: Option<u32>) -> i64 {
    node.map_or(-1, Into::into)
}

fn ethdevs(facts: &Facts, _: &str) -> Option<Value> {
    Some(numbers(facts, |_| true))
}

fn vfios(facts: &Facts, _: &str) -> Option<Value> {
    Some(numbers(facts, |port| port.report.is_some()))
}

fn numbers(facts: &Facts, wanted: impl Fn(&PortFacts) -> bool) -> Value {
    let open = facts.ports.iter().enumerate().filter(|(_, port)| port.status.get().is_open && wanted(port));
    json!(open.map(|(number, _)| number).collect::<Vec<_>>())
}

fn ethdev_info(facts: &Facts, parameters: &str) -> Option<Value> {
    let (number, port, _) = facts.port(parameters)?;
    let PortStatus { is_started, is_promiscuous, .. } = port.status.get();
    let PortConfig { rx_queues, tx_queues, .. } = port.config;
    let states = |queues: u16| vec![i32::from(is_started); queues.into()];
    Some(json!({
        "name": port.name, "state": RTE_ETH_DEV_ATTACHED, "nb_rx_queues": rx_queues, "nb_tx_queues": tx_queues,
        "port_id": number, "mtu": port.config.mtu(), "rx_mbuf_size_min": DATA_ROOM,
        "mac_addr": port.mac, "promiscuous": i32::from(is_promiscuous),
        "scattered_rx": i32::from(port.config.is_scattered()), "all_multicast": 0,
        "dev_started": i32::from(is_started), "lro": 0, "dev_configured": 1,
        "rxq_state": states(rx_queues), "txq_state": states(tx_queues), "numa_node": socket(port.node),
        "dev_flags": "0x0", "rx_offloads": port.rx_offloads(), "tx_offloads": port.tx_offloads(),
        "ethdev_rss_hf": "0x0",
    }))
}

/// State of an open port in DPDK (`enum rte_eth_dev_state`).
const RTE_ETH_DEV_ATTACHED: u8 = 1;

fn link_status(facts: &Facts, parameters: &str) -> Option<Value> {
    let (_, port, _) = facts.port(parameters)?;
    let Some(Link { up: true, speed, full_duplex, .. }) = port.status.get().link else {
        return Some(json!({ "status": "DOWN" }));
    };
    let duplex = if full_duplex { "full-duplex" } else { "half-duplex" };
    Some(json!({ "status": "UP", "speed": speed.unwrap_or(RTE_ETH_SPEED_NUM_UNKNOWN), "duplex": duplex }))
}

/// Speed of a device that does not report it, in DPDK.
const RTE_ETH_SPEED_NUM_UNKNOWN: u32 = u32::MAX;

fn macs(facts: &Facts, parameters: &str) -> Option<Value> {
    facts.port(parameters).map(|(_, port, _)| json!([port.mac]))
}

fn stats(facts: &Facts, parameters: &str) -> Option<Value> {
    let stats = facts.port(parameters)?.1.counters.read();
    let (rx, tx) = (stats.rx_sum(), stats.tx_sum());
    let of =
        |queues: &[QueueStats], count: fn(&QueueStats) -> u64| queues.iter().map(count).collect::<Vec<_>>();
    Some(json!({
        "ipackets": rx.packets, "opackets": tx.packets, "ibytes": rx.bytes, "obytes": tx.bytes,
        "imissed": missed(&stats), "ierrors": rx.errors, "oerrors": tx.errors, "rx_nombuf": rx.no_buffer,
        "q_ipackets": of(&stats.rx, |queue| queue.packets), "q_opackets": of(&stats.tx, |queue| queue.packets),
        "q_ibytes": of(&stats.rx, |queue| queue.bytes), "q_obytes": of(&stats.tx, |queue| queue.bytes),
        "q_errors": of(&stats.rx, |queue| queue.errors),
    }))
}

/// Packets that the device dropped because it had no buffer for them, if it counts them.
fn missed(stats: &PortStats) -> u64 {
    stats.device.iter().find(|(name, _)| *name == "rx_missed_errors").map_or(0, |(_, count)| *count)
}

/// DPDK's names of the counters of every port (`eth_dev_stats_strings`), and their names in Vireo.
const RENAMED: [(&str, &str); 5] = [
    ("rx_good_packets", "rx_packets"),
    ("tx_good_packets", "tx_packets"),
    ("rx_good_bytes", "rx_bytes"),
    ("tx_good_bytes", "tx_bytes"),
    ("rx_mbuf_allocation_errors", "rx_no_buffer"),
];

fn xstats(facts: &Facts, parameters: &str) -> Option<Value> {
    let (_, port, options) = facts.port(parameters)?;
    let hides_zero = match options {
        "" | "hide_zero=false" => false,
        "hide_zero=true" => true,
        _ => return None,
    };
    let (stats, status) = (port.counters.read(), port.status.get());
    let mut counters = stats.named();
    counters.push(("rx_missed_errors".into(), missed(&stats)));
    counters.extend([("restarts".into(), status.restarts), ("link_changes".into(), status.link_changes)]);
    let renamed =
        |name: String| RENAMED.iter().find(|(_, own)| *own == name).map_or(name, |(dpdk, _)| (*dpdk).into());
    let shown = counters.into_iter().filter(|(_, count)| *count > 0 || !hides_zero);
    Some(shown.map(|(name, count)| (renamed(name), count.into())).collect::<Map<_, _>>().into())
}

/// Finds a queue by the parameters `port,queue`. The queue may be left out if the port has one.
fn queue<'f>(
    facts: &'f Facts,
    parameters: &str,
    count: fn(&PortConfig) -> u16,
) -> Option<(&'f PortFacts, u16)> {
    let (_, port, rest) = facts.port(parameters)?;
    let count = count(&port.config);
    let number = if rest.is_empty() && count == 1 { 0 } else { rest.parse().ok()? };
    (number < count).then_some((port, number))
}

fn rx_queue(facts: &Facts, parameters: &str) -> Option<Value> {
    let (port, number) = queue(facts, parameters, |config| config.rx_queues)?;
    let scattered = if port.config.is_scattered() { "on" } else { "off" };
    Some(json!({
        "mempool_name": port.pools.get(usize::from(number)), "socket_id": socket(port.node), "deferred_start": "off",
        "offloads": port.rx_offloads(), "scattered_rx": scattered,
        "queue_state": i32::from(port.status.get().is_started), "nb_desc": port.config.rx_descriptors,
        "rx_buf_size": DATA_ROOM,
    }))
}

fn tx_queue(facts: &Facts, parameters: &str) -> Option<Value> {
    let (port, _) = queue(facts, parameters, |config| config.tx_queues)?;
    Some(json!({
        "deferred_start": "off", "offloads": port.tx_offloads(),
        "queue_state": i32::from(port.status.get().is_started), "nb_desc": port.config.tx_descriptors,
    }))
}

fn mempools(facts: &Facts, _: &str) -> Option<Value> {
    Some(json!(facts.pools.iter().map(|(name, _)| name).collect::<Vec<_>>()))
}

fn mempool_info(facts: &Facts, parameters: &str) -> Option<Value> {
    let number = facts.pools.iter().position(|(name, _)| *name == parameters)?;
    let (name, pool) = &facts.pools[number];
    Some(json!({
        "name": name, "pool_id": number, "flags": 0, "socket_id": -1, "size": pool.count(),
        "cache_size": PoolCache::CAPACITY, "elt_size": BUFFER_SIZE, "header_size": 0, "trailer_size": 0,
        "private_data_size": 0, "populated_size": pool.count(), "common_pool_count": pool.available(),
    }))
}

fn vfio_info(facts: &Facts, parameters: &str) -> Option<Value> {
    let (number, port, _) = facts.port(parameters)?;
    let Report { mode, why, phases } = port.report.as_ref()?;
    let phases = phases.iter().map(|phase| json!({ "name": phase.name, "ns": phase.took.as_nanos() as u64 }));
    Some(json!({
        "port_id": number, "address": port.name, "mode": mode.name(), "why": why,
        "iommu": mode.has_iommu(), "phases": phases.collect::<Vec<_>>(),
    }))
}

/// Number of calls in one answer, which has at most 64 KiB.
const CALLS_PER_ANSWER: usize = 200;

fn vfio_trace(_: &Facts, parameters: &str) -> Option<Value> {
    let from: usize = if parameters.is_empty() { 0 } else { parameters.parse().ok()? };
    let calls = ioctl::trace();
    let call = |call: &ioctl::Call| {
        json!({
            "call": call.name, "at_ns": call.at.as_nanos() as u64, "ns": call.time.as_nanos() as u64,
            "errno": call.errno.map(|errno| format!("{errno:?}")),
        })
    };
    let shown = calls.iter().skip(from).take(CALLS_PER_ANSWER).map(call);
    Some(json!({ "count": calls.len(), "from": from, "calls": shown.collect::<Vec<_>>() }))
}

fn ioas_list(facts: &Facts, _: &str) -> Option<Value> {
    let mut ports: BTreeMap<u32, Vec<usize>> = BTreeMap::new();
    for (number, port) in facts.ports.iter().enumerate().filter(|(_, port)| port.status.get().is_open) {
        if let Some(id) = port.ioas {
            ports.entry(id).or_default().push(number);
        }
    }
    let space = |(id, ports): (&u32, &Vec<usize>)| {
        let maps = facts.maps.get(id).map_or(0, Vec::len);
        json!({ "id": id, "ports": ports, "maps": maps })
    };
    Some(json!(ports.iter().map(space).collect::<Vec<_>>()))
}

fn ioas_maps(facts: &Facts, parameters: &str) -> Option<Value> {
    let maps = facts.maps.get(&parameters.parse().ok()?)?;
    let map = |iovas: &RangeInclusive<u64>| {
        let (iova, len) = (format!("{:#x}", iovas.start()), iovas.end() - iovas.start() + 1);
        json!({ "iova": iova, "len": len })
    };
    Some(json!(maps.iter().map(map).collect::<Vec<_>>()))
}
