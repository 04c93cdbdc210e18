//! DMA memory of a program's ports: what they need, on which NUMA node it is, and which port reaches what.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

use vireo_eal::dma::{DmaMemory, Part, Pool};
use vireo_eal::lcore::Lcores;
use vireo_eal::mem::{self, Region};
use vireo_eal::vfio::AddressSpace;
use vireo_eal::{Eal, Error, ErrorKind, Result};

use crate::port::{Nic, PortConfig};
use crate::ports::OpenPort;
use crate::table::Port;

/// What the ports of a program need of DMA memory.
#[derive(Clone, Copy, Debug)]
pub struct MemoryNeed {
    /// Packet buffers that devices receive into and send from.
    pub buffers: u32,
    /// Packet buffers that they only send from.
    pub send_only: u32,
    /// How each port is started.
    pub config: PortConfig,
}

/// The NUMA nodes of a machine that has several.
#[derive(Debug)]
struct Nodes<'a> {
    numbers: Vec<u32>,
    /// MiB of each node, by its number, if `--numa-mem` gives them.
    given: &'a [u64],
    /// Size in bytes of the pages that memory is made of.
    page: usize,
}

/// Which ports have their rings in a part of their own; all others have them among the buffers.
#[derive(Clone, Debug, Default)]
struct Place {
    /// Those of this address space, where there are several.
    space: Option<Arc<AddressSpace>>,
    /// Those of this node, where there are several.
    node: Option<u32>,
}

impl Place {
    fn is(&self, other: &Self) -> bool {
        let address = |place: &Self| place.space.as_ref().map(Arc::as_ptr);
        address(self) == address(other) && self.node == other.node
    }
}

/// Where everything goes.
#[derive(Debug)]
struct Layout {
    /// The address spaces of all ports.
    spaces: Vec<Arc<AddressSpace>>,
    /// The first part, which every port reaches.
    buffers: Part,
    rings: Vec<(Place, Part)>,
    /// Node of what belongs to a port, by the port's own node.
    near: BTreeMap<Option<u32>, u32>,
}

impl<'a> Nodes<'a> {
    /// Those of this machine, for pages of `page` bytes; none when it has one.
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

    /// Node of what belongs to a port on `node`: its own, unless `--numa-mem` leaves that out. That has to give all that
    /// there is, so a port without a node gets one, too.
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
    /// Bytes for these and for the rings of `ports`, on a machine without NUMA nodes.
    pub fn bytes(&self, ports: &[&OpenPort]) -> usize {
        self.layout(ports, |_| None).parts().iter().map(Part::bytes).sum()
    }

    /// What a port's rings take: bytes that its device writes, and bytes that it only reads.
    fn rings(&self, port: &Port) -> [usize; 2] {
        /// Room for the alignment of each of a pair's parts, and for what is small.
        const REST: usize = 32 << 10;
        let pairs = usize::from(self.config.rx_queues.max(self.config.tx_queues));
        let with_rest = |bytes| if bytes > 0 { bytes + pairs * REST } else { 0 };
        (port.capabilities().ring_bytes)(&self.config).map(with_rest)
    }

    /// Where everything goes: rings in a part for the address space of their port, where there are several, and for its node,
    /// which `near` gives.
    fn layout(&self, ports: &[&OpenPort], near: impl Fn(&OpenPort) -> Option<u32>) -> Layout {
        let bytes = |buffers| if buffers > 0 { Pool::bytes(buffers) } else { 0 };
        let spaces = spaces(ports);
        let buffers = Part {
            read_write: bytes(self.buffers),
            read_only: bytes(self.send_only),
            spaces: spaces.clone(),
            nodes: Vec::new(),
        };
        let mut layout = Layout { spaces, buffers, rings: Vec::new(), near: BTreeMap::new() };
        for open in ports {
            let node = near(open);
            layout.near.extend(node.map(|node| (open.node, node)));
            let space = open.space.clone().filter(|_| layout.spaces.len() > 1);
            let [read_write, read_only] = self.rings(&open.port);
            let part = layout.part(Place { space, node });
            part.read_write += read_write;
            part.read_only += read_only;
        }
        layout
    }

    /// Where everything goes, on a machine of several nodes: of the buffers, which stay one range, each node has the more
    /// the more ports it has; rings are on the node of their port. Nothing shares a page with what is on another node.
    ///
    /// # Errors
    /// `Usage` when `--numa-mem` gives a node less than its ports need.
    fn layout_on(&self, nodes: &Nodes<'_>, ports: &[&OpenPort]) -> Result<Layout> {
        let pages = |bytes: usize| bytes.next_multiple_of(nodes.page);
        let mut layout = self.layout(ports, |open| nodes.near(open.node));
        let mut ports_on: BTreeMap<u32, usize> = BTreeMap::new();
        for node in ports.iter().filter_map(|open| nodes.near(open.node)) {
            *ports_on.entry(node).or_default() += 1;
        }
        let shared = &mut layout.buffers;
        let count: usize = ports_on.values().sum();
        let each = Pool::bytes(self.buffers).div_ceil(count.max(1));
        shared.nodes = ports_on.iter().map(|(node, ports)| (*node, pages(each * ports))).collect();
        // What is beside the buffers is not the first node's, but all of a part is by whole pages.
        let buffers: usize = shared.nodes.iter().map(|(_, bytes)| bytes).sum();
        shared.read_write = buffers.max(shared.read_write);
        to_pages(shared, nodes.page);
        for (place, part) in &mut layout.rings {
            to_pages(part, nodes.page);
            part.nodes = place.node.map(|node| (node, part.bytes())).into_iter().collect();
        }
        for (node, megabytes) in (0..).zip(nodes.given) {
            let given = pages((*megabytes as usize) << 20);
            let used = layout.on_node(node);
            if used > given {
                return Err(too_little(nodes.given, node as usize, used.div_ceil(1 << 20)));
            }
            if used < given {
                // Reserved as asked, though nobody needs it.
                let part = layout.part(Place { space: None, node: Some(node) });
                part.read_write += given - used;
                part.nodes = vec![(node, part.bytes())];
            }
        }
        Ok(layout)
    }
}

/// Makes a part's length a multiple of `page`.
fn to_pages(part: &mut Part, page: usize) {
    let all = part.bytes().next_multiple_of(page);
    part.read_only = part.read_only.next_multiple_of(mem::page_size());
    part.read_write = all - part.read_only;
}

impl Layout {
    /// The part of `place`; made if there is none.
    fn part(&mut self, place: Place) -> &mut Part {
        if place.is(&Place::default()) {
            return &mut self.buffers;
        }
        let at = self.rings.iter().position(|(known, _)| known.is(&place)).unwrap_or_else(|| {
            let spaces = place.space.clone().map_or_else(|| self.spaces.clone(), |own| vec![own]);
            self.rings.push((place, Part { spaces, ..Part::default() }));
            self.rings.len() - 1
        });
        &mut self.rings[at].1
    }

    fn parts(&self) -> Vec<Part> {
        std::iter::once(&self.buffers).chain(self.rings.iter().map(|(_, part)| part)).cloned().collect()
    }

    /// Bytes of node `node`.
    fn on_node(&self, node: u32) -> usize {
        let parts = self.parts();
        parts.iter().flat_map(|part| &part.nodes).filter(|(on, _)| *on == node).map(|(_, bytes)| bytes).sum()
    }
}

fn too_little(given: &[u64], node: usize, need: usize) -> Error {
    let enough: Vec<u64> =
        given.iter().enumerate().map(|(at, of)| if at == node { need as u64 } else { *of }).collect();
    Error::new(
        ErrorKind::Usage,
        format!("cannot work with --numa-mem {}", list(given)),
        format!("ports and packet buffers need {need} MiB on node {node}"),
    )
    .with_hint(format!("give --numa-mem {} or leave it out", list(&enough)))
}

/// The address spaces of `ports`, each once.
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
    /// For packet buffers: every port reaches it.
    pub buffers: Arc<DmaMemory>,
    /// For rings, if they are not among the buffers.
    rings: Vec<(Place, Arc<DmaMemory>)>,
    /// Address spaces that it is mapped in.
    pub spaces: usize,
    /// Bytes of each NUMA node, where the machine has several.
    pub nodes: BTreeMap<u32, usize>,
    /// As in [`Layout`].
    near: BTreeMap<Option<u32>, u32>,
}

impl PortMemory {
    /// What to start `port` with: no port in another address space reaches the rings in it.
    pub fn of(&self, port: &OpenPort) -> &Arc<DmaMemory> {
        let space = port.space.clone().filter(|_| self.spaces > 1);
        let place = Place { space, node: self.node_of(port) };
        let own = self.rings.iter().find(|(known, _)| known.is(&place));
        own.map_or(&self.buffers, |(_, memory)| memory)
    }

    /// NUMA node of the memory that is for `port`; none where that makes no difference or nobody asked.
    pub fn node_of(&self, port: &OpenPort) -> Option<u32> {
        self.near.get(&port.node).copied()
    }

    fn map(region: Region, layout: Layout) -> Result<Self> {
        let parts = layout.parts();
        let mut nodes: BTreeMap<u32, usize> = BTreeMap::new();
        for (node, bytes) in parts.iter().flat_map(|part| &part.nodes) {
            *nodes.entry(*node).or_default() += bytes;
        }
        let mut memory = DmaMemory::map_parts(region, &parts)?.into_iter();
        let buffers = memory.next().ok_or_else(|| {
            Error::new(
                ErrorKind::Protocol,
                "cannot map memory for the ports",
                "there is no part for packet buffers",
            )
        })?;
        let rings = layout.rings.into_iter().map(|(place, _)| place).zip(memory).collect();
        Ok(Self { buffers, rings, spaces: layout.spaces.len(), nodes, near: layout.near })
    }
}

impl From<Arc<DmaMemory>> for PortMemory {
    /// One memory for all, as of ports without an address space.
    fn from(buffers: Arc<DmaMemory>) -> Self {
        Self { buffers, rings: Vec::new(), spaces: 0, nodes: BTreeMap::new(), near: BTreeMap::new() }
    }
}

/// Warns once when an lcore, a port that it serves (`served`) and the port's memory are not on one NUMA node.
pub fn warn_of_distance<'a>(
    lcores: &Lcores,
    memory: &PortMemory,
    served: impl Iterator<Item = (u32, &'a OpenPort)>,
) {
    let sysfs = Path::new("/sys");
    let node_of = |lcore| {
        let mut nodes = lcores.cpus(lcore).iter().map(|cpu| mem::node_of_cpu(sysfs, *cpu));
        // Of an lcore that floats over several nodes nobody knows.
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
        "lcore {lcore} is on NUMA node {lcore_at}, port {} that it serves on node {at}, and its packet memory on node \
         {own}{more}: packets cross between nodes; cpus of node {at} for -l: {cpus}",
        open.name
    );
}

/// Reserves memory for `ports` as the arguments ask for it, on the NUMA node of each of them, and maps it: packet buffers in
/// each address space, rings in that of their port.
///
/// # Errors
/// As for [`Eal::reserve`] and [`DmaMemory::map_parts`]; `Usage` when `--numa-mem` gives a node less than its ports need.
pub fn reserve(eal: &Eal, need: &MemoryNeed, ports: &[&OpenPort]) -> Result<PortMemory> {
    let layout = match Nodes::of_machine(&eal.args.memory.socket_mem, eal.backing().page_size()?)? {
        Some(nodes) => need.layout_on(&nodes, ports)?,
        None => need.layout(ports, |_| None),
    };
    PortMemory::map(eal.reserve(&layout.parts())?, layout)
}

/// Maps `region` for all of `ports`, as [`reserve`] does on a machine without NUMA nodes.
///
/// # Errors
/// As for [`DmaMemory::map_parts`].
pub fn map(region: Region, need: &MemoryNeed, ports: &[&OpenPort]) -> Result<PortMemory> {
    PortMemory::map(region, need.layout(ports, |_| None))
}

#[cfg(test)]
mod tests {
    use vireo_eal::bdf::Bdf;

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
        for part in layout.parts() {
            assert!(part.bytes().is_multiple_of(PAGE), "{part:?}");
            assert!(part.nodes.iter().all(|(_, bytes)| bytes.is_multiple_of(PAGE)), "{part:?}");
            assert!(part.nodes.iter().map(|(_, bytes)| bytes).sum::<usize>() <= part.bytes(), "{part:?}");
        }
        Ok(layout)
    }

    fn by_node(layout: &Layout) -> [usize; 2] {
        [0, 1].map(|node| layout.on_node(node) / PAGE)
    }

    #[test]
    fn memory_is_on_the_nodes_of_the_ports() {
        // 16 MiB of buffers and one more for their alignment; the ports' rings have a page for each node.
        let one = layout(&[Some(1), Some(1)], &[]).unwrap();
        assert_eq!((by_node(&one), &one.buffers.nodes[..]), ([0, 10], &[(1, 9 * PAGE)][..]));
        let both = layout(&[Some(0), Some(1)], &[]).unwrap();
        assert_eq!((by_node(&both), both.near), ([6, 6], [(Some(0), 0), (Some(1), 1)].into()));
        let uneven = layout(&[Some(1), Some(0), Some(1), None], &[]).unwrap();
        assert_eq!(uneven.buffers.nodes, [(0, 3 * PAGE), (1, 6 * PAGE)]);
        // The rings of a port without a node are among the buffers.
        assert_eq!((uneven.rings.len(), uneven.buffers.bytes() > Pool::bytes(8192)), (2, true));
        let nowhere = layout(&[None], &[]).unwrap();
        assert_eq!((by_node(&nowhere), nowhere.rings.len()), ([0, 0], 0));
    }

    #[test]
    fn numa_mem_is_all_that_a_node_gives() {
        let given = layout(&[Some(1), Some(1)], &[16, 64]).unwrap();
        assert_eq!(by_node(&given), [8, 32]);
        let elsewhere = layout(&[Some(1), Some(1)], &[64, 0]).unwrap();
        assert_eq!((by_node(&elsewhere), elsewhere.near), ([32, 0], [(Some(1), 0)].into()));
        let virtual_port = layout(&[None], &[0, 64]).unwrap();
        assert_eq!((by_node(&virtual_port), virtual_port.near), ([0, 32], [(None, 1)].into()));
        let error = layout(&[Some(1), Some(1)], &[16, 2]).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Usage);
        assert_eq!(
            error.to_string(),
            "cannot work with --numa-mem 16,2: ports and packet buffers need 20 MiB on node 1; give --numa-mem 16,20 \
             or leave it out"
        );
        layout(&[Some(1), Some(1)], &[16, 20]).unwrap();
    }
}
