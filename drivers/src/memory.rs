//! DMA memory of a program's ports: its size, its NUMA nodes, and which port reaches which part.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

use vireo_eal::dma::{DmaMemory, MemoryMap, Part, Pool};
use vireo_eal::lcore::Lcores;
use vireo_eal::mem::{self, Region};
use vireo_eal::vfio::AddressSpace;
use vireo_eal::{Eal, Error, ErrorKind, Result};

use crate::port::{Nic, PortConfig};
use crate::ports::OpenPort;
use crate::table::Port;

/// DMA memory that the ports of a program need.
#[derive(Clone, Copy, Debug)]
pub struct MemoryNeed {
    /// Number of packet buffers that devices receive into and send from.
    pub buffers: u32,
    /// Number of packet buffers that devices only send from.
    pub send_only: u32,
    /// Configuration with which each port is started.
    pub config: PortConfig,
}

/// The NUMA nodes of a machine that has several.
#[derive(Debug)]
struct Nodes<'a> {
    numbers: Vec<u32>,
    /// MiB per node, indexed by node number, if `--numa-mem` specifies them.
    given: &'a [u64],
    /// Size in bytes of the pages that back the memory.
    page: usize,
}

/// Placement of all memory.
#[derive(Debug, Default)]
struct Layout {
    /// The address spaces of all ports.
    spaces: Vec<Arc<AddressSpace>>,
    /// Contents of each region by NUMA node; `None` means any node.
    regions: BTreeMap<Option<u32>, Contents>,
    /// Bytes per node that `--numa-mem` requests beyond the ports' needs, in regions of their own.
    spare: BTreeMap<u32, usize>,
    /// Node of a port's memory, by the port's own node.
    near: BTreeMap<Option<u32>, Option<u32>>,
}

/// Contents of one region.
#[derive(Debug, Default)]
struct Contents {
    /// Packet buffers, and the rings of ports that have no address space of their own.
    buffers: Part,
    /// Rings that only their own port's address space maps, by address space.
    rings: Vec<(Arc<AddressSpace>, Part)>,
    /// Number of ports whose packet buffers are in this region.
    ports: u32,
}

impl Contents {
    fn parts(&self) -> Vec<Part> {
        std::iter::once(&self.buffers).chain(self.rings.iter().map(|(_, part)| part)).cloned().collect()
    }

    fn bytes(&self) -> usize {
        self.parts().iter().map(Part::bytes).sum()
    }

    /// Returns the part for the rings of a port whose address space is `own`, or the buffers' part if the
    /// port has none of its own.
    fn rings_of(&mut self, own: Option<&Arc<AddressSpace>>) -> &mut Part {
        let Some(own) = own else { return &mut self.buffers };
        let at = self.rings.iter().position(|(space, _)| Arc::ptr_eq(space, own)).unwrap_or_else(|| {
            self.rings.push((Arc::clone(own), Part { spaces: vec![Arc::clone(own)], ..Part::default() }));
            self.rings.len() - 1
        });
        &mut self.rings[at].1
    }
}

impl<'a> Nodes<'a> {
    /// Returns the nodes of this machine, for pages of `page` bytes; `None` if it has only one node.
    fn of_machine(given: &'a [u64], page: usize) -> Result<Option<Self>> {
        let numbers = mem::nodes(Path::new("/sys"));
        if numbers.len() < 2 {
            return Ok(None);
        }
        if let Some(missing) = given.iter().enumerate().find_map(|(node, megabytes)| {
            let node = node as u32;
            (*megabytes > 0 && !numbers.contains(&node)).then_some(node)
        }) {
            return Err(Error::new(
                ErrorKind::Usage,
                format!("cannot use --numa-mem {}", list(given)),
                format!("node {missing} has no memory"),
            )
            .with_hint("see which have: cat /sys/devices/system/node/has_memory"));
        }
        Ok(Some(Self { numbers, given, page }))
    }

    /// Returns the node for the memory of a port on `node`: that node, unless `--numa-mem` omits it. With
    /// `--numa-mem`, all memory comes from the nodes it lists, so a port without a node is assigned one as
    /// well.
    fn near(&self, node: Option<u32>) -> Option<u32> {
        let node = node.filter(|node| self.numbers.contains(node));
        let gives = |node: &u32| self.given.get(*node as usize).is_some_and(|of| *of > 0);
        match node {
            _ if self.given.is_empty() => node,
            Some(own) if gives(&own) => node,
            _ => self.numbers.iter().copied().find(gives),
        }
    }
}

fn list(numbers: &[u64]) -> String {
    numbers.iter().map(u64::to_string).collect::<Vec<_>>().join(",")
}

impl MemoryNeed {
    /// Returns the number of bytes for these buffers and for the rings of `ports`, on a machine without NUMA
    /// nodes.
    pub fn bytes(&self, ports: &[&OpenPort]) -> usize {
        self.layout(ports, |_| None).regions.values().map(Contents::bytes).sum()
    }

    /// Returns the number of bytes of a port's rings: those its device writes, and those it only reads.
    fn rings(&self, port: &Port) -> [usize; 2] {
        /// Allowance per queue pair for the alignment of each part and for small structures.
        const REST: usize = 32 << 10;
        let pairs = usize::from(self.config.rx_queues.max(self.config.tx_queues));
        let with_rest = |bytes| if bytes > 0 { bytes + pairs * REST } else { 0 };
        (port.capabilities().ring_bytes)(&self.config).map(with_rest)
    }

    /// Places rings and packet buffers in the region of the node that `near` returns for their port. A node's
    /// share of the buffers is proportional to its number of ports. Send-only buffers go to the first region.
    fn layout(&self, ports: &[&OpenPort], near: impl Fn(&OpenPort) -> Option<u32>) -> Layout {
        let mut layout = Layout { spaces: spaces(ports), ..Layout::default() };
        // Rings of a port without a node go to the first node that another port has.
        let elsewhere = ports.iter().find_map(|open| near(open));
        for open in ports {
            let node = near(open).or(elsewhere);
            layout.near.insert(open.node, node);
            let own = open.space.as_ref().filter(|_| layout.spaces.len() > 1);
            let contents = layout.regions.entry(node).or_default();
            contents.ports += 1;
            let ([read_write, read_only], part) = (self.rings(&open.port), contents.rings_of(own));
            part.read_write += read_write;
            part.read_only += read_only;
        }
        if layout.regions.is_empty() {
            layout.regions.insert(None, Contents { ports: 1, ..Contents::default() });
        }
        let ports: Vec<u32> = layout.regions.values().map(|contents| contents.ports).collect();
        let shares = shares(self.buffers, &ports);
        let send_only = std::iter::once(self.send_only).chain(std::iter::repeat(0));
        let bytes = |buffers| if buffers > 0 { Pool::bytes(buffers) } else { 0 };
        for ((contents, buffers), send_only) in layout.regions.values_mut().zip(shares).zip(send_only) {
            contents.buffers.spaces = layout.spaces.clone();
            contents.buffers.read_write += bytes(buffers);
            contents.buffers.read_only += bytes(send_only);
        }
        layout
    }

    /// Places everything as [`MemoryNeed::layout`] does, on a machine with several nodes.
    ///
    /// # Errors
    /// `Usage` when `--numa-mem` gives a node less memory than its ports need.
    fn layout_on(&self, nodes: &Nodes<'_>, ports: &[&OpenPort]) -> Result<Layout> {
        let pages = |bytes: usize| bytes.next_multiple_of(nodes.page);
        let mut layout = self.layout(ports, |open| nodes.near(open.node));
        for (node, megabytes) in (0..).zip(nodes.given) {
            let given = pages((*megabytes as usize) << 20);
            let used = layout.regions.get(&Some(node)).map_or(0, |contents| pages(contents.bytes()));
            if used > given {
                return Err(too_little(nodes.given, node as usize, used.div_ceil(1 << 20)));
            }
            if given > used {
                layout.spare.insert(node, given - used);
            }
        }
        Ok(layout)
    }
}

/// Divides `count` buffers among nodes in proportion to their numbers of ports.
fn shares(count: u32, ports: &[u32]) -> Vec<u32> {
    let all: u64 = ports.iter().copied().map(u64::from).sum();
    // What rounding takes from one share goes to a later share, so that the shares add up to `count`.
    let end = |ports: u64| (u64::from(count) * ports).checked_div(all).unwrap_or(0) as u32;
    let mut before = 0;
    let share = |own: &u32| {
        let start = end(before);
        before += u64::from(*own);
        end(before) - start
    };
    ports.iter().map(share).collect()
}

impl Layout {
    /// Returns the size of each region in bytes with its node, in the order of [`Layout::parts`].
    fn sizes(&self) -> Vec<(Option<u32>, usize)> {
        let used = self.regions.iter().map(|(node, contents)| (*node, contents.bytes()));
        used.chain(self.spare.iter().map(|(node, bytes)| (Some(*node), *bytes))).collect()
    }

    /// Returns the parts of each region. Spare memory comes last because a pool's buffers must lie within 4
    /// GiB of each other.
    fn parts(&self) -> Vec<Vec<Part>> {
        let spare =
            self.spare.values().map(|_| vec![Part { spaces: self.spaces.clone(), ..Part::default() }]);
        self.regions.values().map(Contents::parts).chain(spare).collect()
    }
}

fn too_little(given: &[u64], node: usize, need: usize) -> Error {
    let enough: Vec<u64> =
        given.iter().enumerate().map(|(at, of)| if at == node { need as u64 } else { *of }).collect();
    Error::new(
        ErrorKind::Usage,
        format!("cannot use --numa-mem {}", list(given)),
        format!("ports and packet buffers need {need} MiB on node {node}"),
    )
    .with_hint(format!("use --numa-mem {} or leave it out", list(&enough)))
}

/// Returns the address spaces of `ports`, each once.
fn spaces(ports: &[&OpenPort]) -> Vec<Arc<AddressSpace>> {
    let mut spaces: Vec<Arc<AddressSpace>> = Vec::new();
    for space in ports.iter().filter_map(|port| port.space.as_ref()) {
        if !spaces.iter().any(|known| Arc::ptr_eq(known, space)) {
            spaces.push(Arc::clone(space));
        }
    }
    spaces
}

/// Memory of a program's ports.
#[derive(Debug)]
pub struct PortMemory {
    map: Arc<MemoryMap>,
    /// Memory of each region by NUMA node; `None` means any node.
    regions: BTreeMap<Option<u32>, Own>,
    /// Spare bytes per node, as in [`Layout`].
    spare: BTreeMap<u32, usize>,
    /// Node of a port's memory, as in [`Layout`].
    near: BTreeMap<Option<u32>, Option<u32>>,
}

/// Memory in one region.
#[derive(Debug)]
struct Own {
    /// Memory for packet buffers, which every port reaches.
    buffers: Arc<DmaMemory>,
    /// Memory for rings that are not in `buffers`, by the address space of their port.
    rings: Vec<(Arc<AddressSpace>, Arc<DmaMemory>)>,
    /// Number of ports, as in [`Contents`].
    ports: u32,
}

impl PortMemory {
    /// Returns the memory to start `port` with. No port in another address space reaches the rings in it.
    ///
    /// # Errors
    /// `Usage` when the memory was not reserved for this port.
    pub fn of(&self, port: &OpenPort) -> Result<&Arc<DmaMemory>> {
        let own = self.regions.get(&self.node_of(port)).or_else(|| self.regions.values().next());
        let own = own.ok_or_else(|| {
            let what = format!("cannot start port {}", port.name);
            Error::new(ErrorKind::Usage, what, "its memory was reserved for other ports")
        })?;
        let is_its = |space: &&(Arc<AddressSpace>, _)| {
            port.space.as_ref().is_some_and(|its| Arc::ptr_eq(its, &space.0))
        };
        Ok(own.rings.iter().find(is_its).map_or(&own.buffers, |(_, rings)| rings))
    }

    /// Returns the NUMA node of the memory for `port`; `None` means any node.
    pub fn node_of(&self, port: &OpenPort) -> Option<u32> {
        self.near.get(&port.node).copied().flatten()
    }

    /// Returns the map that contains all of the memory.
    pub fn memory_map(&self) -> &Arc<MemoryMap> {
        &self.map
    }

    /// Returns the number of address spaces that map this memory.
    pub fn spaces(&self) -> usize {
        self.map.spaces().len()
    }

    /// Returns the bytes on each NUMA node, if the machine has several.
    pub fn nodes(&self) -> BTreeMap<u32, usize> {
        let mut nodes = self.spare.clone();
        for (node, own) in &self.regions {
            if let Some(node) = node {
                *nodes.entry(*node).or_default() += own.buffers.region().len();
            }
        }
        nodes
    }

    /// Creates a pool of `count` packet buffers, shared among nodes in proportion to their numbers of ports.
    ///
    /// # Errors
    /// As for [`Pool::on_nodes`].
    pub fn pool(&self, count: u32) -> Result<Arc<Pool>> {
        let used: Vec<&Own> = self.regions.values().filter(|own| own.ports > 0).collect();
        let shares = shares(count, &used.iter().map(|own| own.ports).collect::<Vec<_>>());
        let shares: Vec<_> = used.iter().map(|own| Arc::clone(&own.buffers)).zip(shares).collect();
        Pool::on_nodes(&shares)
    }

    /// Creates a pool of `count` packet buffers that devices only send from.
    ///
    /// # Errors
    /// As for [`Pool::send_only`].
    pub fn send_only(&self, count: u32) -> Result<Arc<Pool>> {
        let first = self.regions.values().find(|own| own.ports > 0);
        let none =
            || Error::new(ErrorKind::Usage, "cannot create a pool of packet buffers", "there are no ports");
        Pool::send_only(&first.ok_or_else(none)?.buffers, count)
    }

    /// Maps `region` for every port, even while ports run. The mapping lasts as long as the ports' memory. A
    /// vhost-user peer reaches the region only after [`Nic::update_memory`].
    ///
    /// # Errors
    /// As for [`MemoryMap::add`].
    pub fn add(&self, region: Region) -> Result<Arc<DmaMemory>> {
        let part = Part { read_write: region.len(), spaces: self.map.spaces().to_vec(), ..Part::default() };
        self.map.add(region, &[part])?.pop().ok_or_else(no_part)
    }

    /// Maps `regions`, whose sizes `layout` specified.
    fn map(regions: Vec<Region>, layout: Layout) -> Result<Self> {
        let map = MemoryMap::new(&layout.spaces)?;
        let memory = map.add_all(regions.into_iter().zip(layout.parts()).collect())?;
        let own = |((node, contents), memory): ((Option<u32>, Contents), Vec<Arc<DmaMemory>>)| {
            let mut memory = memory.into_iter();
            let buffers = memory.next().ok_or_else(no_part)?;
            let rings = contents.rings.into_iter().map(|(space, _)| space).zip(memory).collect();
            Ok((node, Own { buffers, rings, ports: contents.ports }))
        };
        let regions = layout.regions.into_iter().zip(memory).map(own).collect::<Result<_>>()?;
        Ok(Self { map, regions, spare: layout.spare, near: layout.near })
    }
}

fn no_part() -> Error {
    Error::new(ErrorKind::Protocol, "cannot map memory for the ports", "there is no part for packet buffers")
}

impl From<Arc<DmaMemory>> for PortMemory {
    /// Wraps one memory for all ports, such as ports without an address space.
    fn from(buffers: Arc<DmaMemory>) -> Self {
        let map = Arc::clone(buffers.memory_map());
        let own = Own { buffers, rings: Vec::new(), ports: 1 };
        Self { map, regions: [(None, own)].into(), spare: BTreeMap::new(), near: BTreeMap::new() }
    }
}

/// Logs one warning if an lcore, a port that it serves (`served`) and the port's memory are not all on the
/// same NUMA node.
pub fn warn_of_distance<'a>(
    lcores: &Lcores,
    memory: &PortMemory,
    served: impl Iterator<Item = (u32, &'a OpenPort)>,
) {
    let sysfs = Path::new("/sys");
    let node_of = |lcore| {
        let mut nodes = lcores.cpus(lcore).iter().map(|cpu| mem::node_of_cpu(sysfs, *cpu));
        // An lcore that floats across several nodes has no node.
        nodes.next().flatten().filter(|first| nodes.all(|node| node == Some(*first)))
    };
    let mut distant = served.filter_map(|(lcore, open)| {
        let (own, at) = (memory.node_of(open)?, open.node?);
        let lcore_at = node_of(lcore)?;
        (own != at || lcore_at != at).then_some((lcore, lcore_at, open, at, own))
    });
    let Some((lcore, lcore_at, open, at, own)) = distant.next() else { return };
    let more = match distant.count() {
        0 => String::new(),
        more => format!(" (and {more} more)"),
    };
    let cpus = mem::cpus_of_node(sysfs, at).unwrap_or_else(|| "none".into());
    tracing::warn!(
        "lcore {lcore} is on NUMA node {lcore_at}, its port {} is on node {at}, and the port's packet memory is on node \
         {own}{more}: packets cross between nodes; CPUs of node {at} for -l: {cpus}",
        open.name
    );
}

/// Reserves memory for `ports` as the EAL arguments specify, one region per NUMA node, and maps it: packet
/// buffers in every address space, rings in the address space of their port.
///
/// # Errors
/// As for [`Eal::reserve`] and [`MemoryMap::add`]; `Usage` when `--numa-mem` gives a node less memory than
/// its ports need.
pub fn reserve(eal: &Eal, need: &MemoryNeed, ports: &[&OpenPort]) -> Result<PortMemory> {
    let layout = match Nodes::of_machine(&eal.args.memory.socket_mem, eal.backing().page_size()?)? {
        Some(nodes) => need.layout_on(&nodes, ports)?,
        None => need.layout(ports, |_| None),
    };
    PortMemory::map(eal.reserve(&layout.sizes())?, layout)
}

/// Maps `region` for all of `ports`, as [`reserve`] does on a machine without NUMA nodes.
///
/// # Errors
/// As for [`MemoryMap::add`].
pub fn map(region: Region, need: &MemoryNeed, ports: &[&OpenPort]) -> Result<PortMemory> {
    PortMemory::map(vec![region], need.layout(ports, |_| None))
}

#[cfg(test)]
mod tests {
    use vireo_eal::bdf::Bdf;
    use vireo_eal::dma::MAX_BUFFERS;
    use vireo_eal::mem::{Backing, Placement};

    use super::*;
    use crate::e1000;
    use crate::fakedev::e1000::{FakeE1000, ID_82574L};
    use crate::port::MacAddr;

    const PAGE: usize = 2 << 20;
    const NEED: MemoryNeed =
        MemoryNeed { buffers: 8192, send_only: 100, config: PortConfig::with_descriptors(1024, 1024) };

    fn ports(nodes: &[Option<u32>]) -> Vec<OpenPort> {
        let port = |(device, node): (u8, &Option<u32>)| {
            let address = Bdf::new(0, 0, device, 0).unwrap();
            let (function, _) = FakeE1000::new(address, ID_82574L, MacAddr([2, 0, 0, 0, 0, device]));
            let port = Port::E1000(e1000::Device::probe(function).unwrap());
            let mut open = OpenPort::virtual_port(port, "port", String::new());
            open.node = *node;
            open
        };
        (1..).zip(nodes).map(port).collect()
    }

    fn layout(nodes: &[Option<u32>], given: &[u64]) -> Result<Layout> {
        let ports = ports(nodes);
        let machine = Nodes { numbers: vec![0, 1], given, page: PAGE };
        let layout = NEED.layout_on(&machine, &ports.iter().collect::<Vec<_>>())?;
        let bytes = |contents: &Contents| contents.buffers.read_write / Pool::bytes(1);
        assert!(layout.regions.values().all(|contents| (contents.ports > 0) == (bytes(contents) > 2)));
        Ok(layout)
    }

    /// Returns the numbers of pages on any node, on node 0 and on node 1.
    fn pages(layout: &Layout) -> [usize; 3] {
        let sizes = layout.sizes();
        let on =
            |node| sizes.iter().filter(move |(of, _)| *of == node).map(|(_, bytes)| bytes.div_ceil(PAGE));
        [None, Some(0), Some(1)].map(|node| on(node).sum())
    }

    #[test]
    fn memory_is_on_the_nodes_of_the_ports() {
        // 16 MiB of buffers, and one page for the ports' rings and the send-only buffers.
        let one = layout(&[Some(1), Some(1)], &[]).unwrap();
        assert_eq!((pages(&one), one.near), ([0, 0, 9], [(Some(1), Some(1))].into()));
        let both = layout(&[Some(0), Some(1)], &[]).unwrap();
        assert_eq!(
            (pages(&both), both.near),
            ([0, 5, 5], [0, 1].map(|node| (Some(node), Some(node))).into())
        );
        let uneven = layout(&[Some(1), Some(0), Some(1)], &[]).unwrap();
        assert_eq!(pages(&uneven), [0, 3, 6]);
        // The rings and buffers of a port without a node go to the node of the first port that has one.
        let mixed = layout(&[Some(1), None, Some(0)], &[]).unwrap();
        assert_eq!((pages(&mixed), mixed.near[&None]), ([0, 3, 6], Some(1)));
        let nowhere = layout(&[None], &[]).unwrap();
        assert_eq!((pages(&nowhere), nowhere.near), ([9, 0, 0], [(None, None)].into()));
        assert_eq!(pages(&layout(&[], &[]).unwrap()), [9, 0, 0]);
    }

    #[test]
    fn numa_mem_is_all_that_a_node_gives() {
        let given = layout(&[Some(1), Some(1)], &[16, 64]).unwrap();
        assert_eq!(pages(&given), [0, 8, 32]);
        let elsewhere = layout(&[Some(1), Some(1)], &[64, 0]).unwrap();
        assert_eq!((pages(&elsewhere), elsewhere.near), ([0, 32, 0], [(Some(1), Some(0))].into()));
        let virtual_port = layout(&[None], &[0, 64]).unwrap();
        assert_eq!((pages(&virtual_port), virtual_port.near), ([0, 0, 32], [(None, Some(1))].into()));
        let error = layout(&[Some(1), Some(1)], &[16, 2]).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Usage);
        assert_eq!(
            error.to_string(),
            "cannot use --numa-mem 16,2: ports and packet buffers need 18 MiB on node 1; use --numa-mem 16,18 \
             or leave it out"
        );
        layout(&[Some(1), Some(1)], &[16, 18]).unwrap();
    }

    /// Buffers of one pool must lie within 4 GiB of each other.
    #[test]
    fn what_nobody_needs_is_behind_all_else() {
        let layout = layout(&[Some(0), Some(1)], &[4096, 4096]).unwrap();
        let sizes = layout.sizes();
        assert_eq!(sizes.iter().map(|(node, _)| node.unwrap()).collect::<Vec<_>>(), [0, 1, 0, 1]);
        assert!(sizes[..2].iter().all(|(_, bytes)| *bytes < 64 << 20), "{sizes:?}");
        assert_eq!((pages(&layout), layout.parts().len()), ([0, 2048, 2048], sizes.len()));
    }

    #[test]
    fn no_buffer_is_lost_where_they_are_shared_out() {
        for (count, ports, expected) in [
            (10, &[1, 1, 1][..], &[3, 3, 4][..]),
            (8192, &[1, 2], &[2730, 5462]),
            (7, &[3, 0, 4], &[3, 0, 4]),
            (MAX_BUFFERS, &[1], &[MAX_BUFFERS]),
            (5, &[0], &[0]),
        ] {
            assert_eq!(shares(count, ports), expected);
        }
    }

    #[test]
    fn ports_of_two_nodes_have_one_pool_with_buffers_near_each() {
        let ports = ports(&[Some(0), Some(1), Some(1)]);
        let ports: Vec<&OpenPort> = ports.iter().collect();
        let layout = NEED.layout(&ports, |open| open.node);
        // Any node will do: the machine may not have nodes 0 and 1.
        let sizes: Vec<_> = layout.sizes().into_iter().map(|(_, bytes)| (None, bytes)).collect();
        let regions = Region::adjoining(&sizes, Backing::SmallPages, Placement::Preferred).unwrap();
        let memory = PortMemory::map(regions, layout).unwrap();
        assert_eq!(memory.nodes().keys().copied().collect::<Vec<_>>(), [0, 1]);
        assert_eq!([0, 1, 2].map(|port: usize| memory.node_of(ports[port])), [Some(0), Some(1), Some(1)]);
        let of = |port: usize| memory.of(ports[port]).unwrap();
        assert!(!Arc::ptr_eq(of(0), of(1)) && Arc::ptr_eq(of(1), of(2)));
        let (pool, send_only) =
            (memory.pool(NEED.buffers).unwrap(), memory.send_only(NEED.send_only).unwrap());
        assert_eq!((pool.available(), send_only.available()), (8192, 100));
        let mut cache = pool.cache();
        let packets: Vec<_> = std::iter::from_fn(|| cache.allocate()).collect();
        let in_region = |port: usize| {
            let start = of(port).linear_iova().unwrap();
            let iovas = start..start + of(port).region().len() as u64;
            packets.iter().filter(|packet| iovas.contains(&cache.iova(packet))).count()
        };
        assert_eq!([in_region(0), in_region(1)], [2730, 5462]);
        packets.into_iter().for_each(|packet| cache.free(packet));
        drop(cache);
        assert_eq!(pool.available(), 8192);
    }

    #[test]
    fn a_region_that_is_added_is_in_the_map_of_the_others() {
        let region = || Region::new(1 << 20, Backing::SmallPages).unwrap();
        let memory = PortMemory::from(DmaMemory::map(region(), &[]).unwrap());
        let added = memory.add(region()).unwrap();
        assert_eq!(memory.map.segments().len(), 2);
        assert!(Arc::ptr_eq(added.memory_map(), &memory.map));
        assert_ne!(added.linear_iova(), memory.regions[&None].buffers.linear_iova());
    }
}
