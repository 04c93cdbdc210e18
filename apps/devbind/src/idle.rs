//! Checks whether a NIC may be taken from its driver. It may not while this machine's traffic, another
//! network namespace, a virtual function or a process needs it.

use std::fs;
use std::net::Ipv6Addr;
use std::path::{Path, PathBuf};

use vireo_bus_pci::PciInfo;
use vireo_eal::bdf::Bdf;
use vireo_eal::{Error, ErrorKind, Result};

use crate::host::{Host, names};

/// Flags of routes that reject packets or lead to this machine: `RTF_REJECT`, `RTF_ANYCAST` and `RTF_LOCAL`
/// (`linux/ipv6_route.h`).
const LOCAL_ROUTE_FLAGS: u32 = 0x0200 | 0x0010_0000 | 0x8000_0000;

/// Why a NIC has to stay with its current driver, and the command that changes this.
#[derive(Debug)]
pub(crate) struct Need {
    why: String,
    hint: String,
}

/// A network interface of a PCI function.
#[derive(Debug)]
pub(crate) struct Interface {
    pub(crate) name: String,
    pub(crate) need: Option<Need>,
}

impl Host {
    /// Refuses a NIC that is in use, unless `force`. Always refuses a NIC that a process has open, because
    /// the kernel would wait for that process forever.
    pub(crate) fn check_idle(&self, info: &PciInfo, force: bool) -> Result<()> {
        let address = info.address;
        let what = || format!("cannot take {address} from {}", info.driver.as_deref().unwrap_or("-"));
        let functions = self.virtual_functions(address);
        let need = || {
            self.interfaces(address)
                .into_iter()
                .find_map(|interface| interface.need)
                .or_else(|| self.is_in_other_namespace(address).then(elsewhere))
                .or_else(|| bound(&functions))
        };
        if let Some(Need { why, hint }) = (!force).then(need).flatten() {
            let hint = format!("{hint}; or, if it is not needed, add --force");
            return Err(Error::new(ErrorKind::Busy, what(), why).with_hint(hint));
        }
        for info in functions.iter().chain([info]) {
            if self.bus.is_on_vfio(info)
                && let Some((pid, name)) = self.holder(info.address)
            {
                let its = match info.address == address {
                    true => String::new(),
                    false => format!("its virtual function {} is ", info.address),
                };
                return Err(Error::new(
                    ErrorKind::Busy,
                    what(),
                    format!("{its}in use by pid {pid} ({name})"),
                )
                .with_hint(format!("stop it: kill {pid}")));
            }
        }
        Ok(())
    }

    /// Returns the function's network interfaces in this network namespace.
    pub(crate) fn interfaces(&self, address: Bdf) -> Vec<Interface> {
        let routed = self.routed();
        let of_dir = |net: PathBuf| {
            names(&net).into_iter().map(move |name| (net.join(&name), name)).collect::<Vec<_>>()
        };
        let found = self.net_dirs(address).into_iter().flat_map(of_dir);
        found
            .map(|(dir, name)| {
                let need = member(&dir, &name).or_else(|| traffic(dir, &name, &routed));
                Interface { name, need }
            })
            .collect()
    }

    /// Returns whether the function's interface is in another network namespace. sysfs then keeps the
    /// directory of the interface's class but shows it empty.
    pub(crate) fn is_in_other_namespace(&self, address: Bdf) -> bool {
        self.net_dirs(address).into_iter().any(|net| net.is_dir() && names(&net).is_empty())
    }

    /// Returns the sysfs directories of the function's interfaces. Those of virtio are one level deeper.
    fn net_dirs(&self, address: Bdf) -> Vec<PathBuf> {
        let device = self.bus.device(address).sysfs;
        let deeper = names(&device).into_iter().filter(|name| name.starts_with("virtio"));
        deeper.map(|name| device.join(name)).chain([device.clone()]).map(|dir| dir.join("net")).collect()
    }

    /// Returns the virtual functions of the function (`virtfnN` in
    /// `Documentation/ABI/testing/sysfs-bus-pci`), sorted by address.
    fn virtual_functions(&self, address: Bdf) -> Vec<PciInfo> {
        let device = self.bus.device(address).sysfs;
        let links = names(&device).into_iter().filter(|name| name.starts_with("virtfn"));
        let mut found: Vec<PciInfo> = links
            .filter_map(|link| {
                let target = fs::read_link(device.join(link)).ok()?;
                self.bus.find(target.file_name()?.to_str()?.parse().ok()?).ok()
            })
            .collect();
        found.sort_by_key(|info| info.address);
        found
    }

    /// Returns the interfaces with routes in the main table of IPv4 or of IPv6, ignoring routes that every
    /// interface has.
    fn routed(&self) -> Vec<String> {
        let read = |table| fs::read_to_string(self.proc.join("net").join(table)).unwrap_or_default();
        let (v4, v6) = (read("route"), read("ipv6_route"));
        let v4 = v4.lines().filter_map(|line| line.split_whitespace().next());
        v4.chain(v6.lines().filter_map(routed_v6)).map(str::to_owned).collect()
    }

    /// Returns the process that has the function's VFIO group or character device open.
    fn holder(&self, address: Bdf) -> Option<(u32, String)> {
        let cdevs = names(&self.bus.device(address).sysfs.join("vfio-dev"));
        let groups =
            self.bus.iommu_group(address).into_iter().flat_map(|n| [n.to_string(), format!("noiommu-{n}")]);
        let paths: Vec<PathBuf> = cdevs
            .into_iter()
            .map(|name| self.vfio.join("devices").join(name))
            .chain(groups.map(|name| self.vfio.join(name)))
            .collect();
        vireo_eal::vfio::holder(&self.proc, &paths)
    }
}

/// Need of another network namespace. A driver that loses its NIC removes the interface, whatever namespace
/// it is in.
fn elsewhere() -> Need {
    Need {
        why: "its interface is in another network namespace, perhaps a container's".to_owned(),
        hint: "find it: lsns -t net".to_owned(),
    }
}

/// Need of those `functions` that have a driver. The driver of their physical function removes them when it
/// is unbound.
fn bound(functions: &[PciInfo]) -> Option<Need> {
    let bound = || functions.iter().filter_map(|info| Some((info.address, info.driver.as_deref()?)));
    bound().next()?;
    let list: Vec<String> = bound().map(|(address, driver)| format!("{address} ({driver})")).collect();
    let addresses: Vec<String> = bound().map(|(address, _)| address.to_string()).collect();
    Some(Need {
        why: format!("its virtual functions are bound: {}", list.join(", ")),
        hint: format!("run: vireo-devbind --unbind {}", addresses.join(" ")),
    })
}

/// Need of a bond or bridge, which sends through interface `name` even if it has no routes of its own.
fn member(dir: &Path, name: &str) -> Option<Need> {
    let link = dir.join("master");
    let master = fs::read_link(&link).ok()?;
    let kinds = [("bonding", "the bond "), ("bridge", "the bridge ")];
    let kind = kinds.iter().find(|(dir, _)| link.join(dir).exists()).map_or("", |(_, kind)| kind);
    Some(Need {
        why: format!("{name} is a member of {kind}{}", master.file_name()?.to_string_lossy()),
        hint: format!("run: ip link set {name} nomaster"),
    })
}

/// Need of this machine's traffic for interface `name`, whose directory is `dir`: it is up, and it or an
/// interface above it has routes.
fn traffic(dir: PathBuf, name: &str, routed: &[String]) -> Option<Need> {
    let state = fs::read_to_string(dir.join("operstate")).unwrap_or_default();
    // A driver that does not report the state leaves "unknown" while the interface is up
    // (`Documentation/networking/operstates.rst`).
    if !matches!(state.trim(), "up" | "unknown") {
        return None;
    }
    let top = stack(dir, name).into_iter().find(|top| routed.contains(top))?;
    let carries = if top == name { String::new() } else { format!("carries {top}, which ") };
    Some(Need {
        why: format!("{name} is up and {carries}has routes"),
        hint: format!("run: ip link set {name} down"),
    })
}

/// Returns the interface of a line of `/proc/net/ipv6_route`, if the route leads beyond the interface's link.
fn routed_v6(line: &str) -> Option<&str> {
    let mut words = line.split_whitespace();
    let destination = Ipv6Addr::from(u128::from_str_radix(words.next()?, 16).ok()?);
    let interface = words.next_back()?;
    let flags = u32::from_str_radix(words.next_back()?, 16).ok()?;
    let of_link = destination.is_unicast_link_local() || destination.is_multicast();
    (!of_link && flags & LOCAL_ROUTE_FLAGS == 0).then_some(interface)
}

/// Returns interface `name`, whose directory is `dir`, and all interfaces above it: its bridge or bond, its
/// VLANs, and theirs in turn.
fn stack(dir: PathBuf, name: &str) -> Vec<String> {
    let mut found = vec![name.to_owned()];
    let mut left = vec![dir];
    while let Some(dir) = left.pop() {
        // The link `master` always has one of these next to it.
        for link in names(&dir) {
            let Some(upper) = link.strip_prefix("upper_") else { continue };
            if !found.iter().any(|known| known == upper) {
                found.push(upper.to_owned());
                left.push(dir.join(&link));
            }
        }
    }
    found
}
