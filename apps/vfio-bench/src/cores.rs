//! The cores that poll, and their distance from each other and from the NICs.

use std::path::Path;

use vireo_bus_pci::PciInfo;
use vireo_eal::args::{allowed_cpus, core_siblings};
use vireo_eal::mem::{distance, node_of_cpu};
use vireo_eal::{Error, ErrorKind, Result};

/// Assignment of cores.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Cores {
    pub(crate) generator: usize,
    pub(crate) forwarder: usize,
    /// A core on which nothing polls.
    pub(crate) idle: Option<usize>,
}

impl Cores {
    /// Uses the first cores that this process is allowed to run on.
    pub(crate) fn of_this_process() -> Result<Self> {
        Self::among(&allowed_cpus()?, &[])
    }

    /// Uses `chosen`, the generator's and the forwarder's core, or the first two allowed cores if `chosen` is
    /// empty.
    pub(crate) fn choose(chosen: &[usize]) -> Result<Self> {
        Self::among(&allowed_cpus()?, chosen)
    }

    /// Chooses the core of the forwarder, the only one that polls with an external generator.
    pub(crate) fn of_forwarder(chosen: &[usize]) -> Result<Self> {
        let allowed = allowed_cpus()?;
        let forwarder = match *chosen {
            [] => allowed.first().copied().unwrap_or_default(),
            [core] => checked(&allowed, core)?,
            _ => {
                return Err(Error::new(
                    ErrorKind::Usage,
                    "cannot use these cores",
                    format!(
                        "{} are given, but with an external generator only the forwarder polls",
                        chosen.len()
                    ),
                )
                .with_hint("use --cores FORWARDER"));
            }
        };
        Ok(Self { generator: forwarder, forwarder, idle: None })
    }

    fn among(allowed: &[usize], chosen: &[usize]) -> Result<Self> {
        let [generator, forwarder] = match *chosen {
            [] => match *allowed {
                [generator, forwarder, ..] => [generator, forwarder],
                _ => {
                    return Err(Error::new(
                        ErrorKind::Unavailable,
                        "cannot measure on one core",
                        "the generator and the forwarder need a core each",
                    )
                    .with_hint("give the machine or the container a second core"));
                }
            },
            [generator, forwarder] if generator != forwarder => {
                [checked(allowed, generator)?, checked(allowed, forwarder)?]
            }
            _ => {
                return Err(Error::new(
                    ErrorKind::Usage,
                    "cannot use these cores",
                    "the generator and the forwarder need a core each",
                )
                .with_hint("use --cores GENERATOR,FORWARDER"));
            }
        };
        let idle = allowed.iter().copied().find(|core| *core != generator && *core != forwarder);
        Ok(Self { generator, forwarder, idle })
    }

    /// Describes the cores for the environment of a recording.
    pub(crate) fn fact(&self, sysfs: &Path) -> String {
        let named = |name: &str, core: usize| {
            let node = node_of_cpu(sysfs, core).map(|node| format!(" (node {node})")).unwrap_or_default();
            format!("{name} {core}{node}")
        };
        if self.generator == self.forwarder {
            return named("forwarder", self.forwarder);
        }
        format!("{}, {}", named("generator", self.generator), named("forwarder", self.forwarder))
    }

    /// Returns warnings about a choice of cores that makes results worse than the machine's best.
    pub(crate) fn warnings<'a>(&self, sysfs: &Path, nics: impl Iterator<Item = &'a PciInfo>) -> Vec<String> {
        let mut found = Vec::new();
        if self.generator != self.forwarder
            && let Some(siblings) = core_siblings(sysfs, self.generator)
            && core_siblings(sysfs, self.forwarder).as_ref() == Some(&siblings)
        {
            found.push(format!(
                "cores {} and {} are threads of one core (cpus {siblings}): the generator takes part of the forwarder's \
                 time. Choose other cores with --cores (see lscpu -e).",
                self.generator, self.forwarder
            ));
        }
        let Some(node) = node_of_cpu(sysfs, self.forwarder) else { return found };
        for nic in nics {
            if let Some(other) = nic.numa_node.filter(|other| *other != node) {
                let distance = distance(sysfs, node, other)
                    .map(|distance| format!(" at distance {distance} (10 is local)"))
                    .unwrap_or_default();
                found.push(format!(
                    "core {} is on node {node}, and {} on node {other}{distance}. Choose a core of that node with --cores \
                     (see lscpu -e).",
                    self.forwarder, nic.address
                ));
            }
        }
        found
    }
}

fn checked(allowed: &[usize], core: usize) -> Result<usize> {
    if allowed.contains(&core) {
        return Ok(core);
    }
    let all: Vec<String> = allowed.iter().map(usize::to_string).collect();
    let why = format!("this process may use cores {}", all.join(","));
    Err(Error::new(ErrorKind::Usage, format!("cannot use core {core}"), why))
}

#[cfg(test)]
mod tests {
    use std::fs;

    use vireo_bus_pci::Bus;

    use super::*;

    /// Cores 0 and 2 are threads of one core on node 0, cores 1 and 3 on node 1.
    fn two_nodes() -> tempfile::TempDir {
        let sysfs = tempfile::tempdir().unwrap();
        for core in 0..4 {
            let cpu = sysfs.path().join(format!("devices/system/cpu/cpu{core}"));
            fs::create_dir_all(cpu.join("topology")).unwrap();
            fs::create_dir_all(cpu.join(format!("node{}", core % 2))).unwrap();
            let siblings = ["0,2\n", "1,3\n"][core % 2];
            fs::write(cpu.join("topology/thread_siblings_list"), siblings).unwrap();
        }
        for (node, row) in ["10 21\n", "21 10\n"].iter().enumerate() {
            let dir = sysfs.path().join(format!("devices/system/node/node{node}"));
            fs::create_dir_all(&dir).unwrap();
            fs::write(dir.join("distance"), row).unwrap();
        }
        sysfs
    }

    /// A NIC in a simulated `sysfs`.
    fn some_nic(sysfs: &Path) -> PciInfo {
        let path = sysfs.join("devices/0000:00:01.0");
        fs::create_dir_all(&path).unwrap();
        for (name, value) in [("vendor", "0x8086"), ("device", "0x10d3"), ("class", "0x020000")] {
            fs::write(path.join(name), value).unwrap();
        }
        Bus::new(sysfs).scan().unwrap().remove(0)
    }

    #[test]
    fn cores_are_two_that_may_be_used() {
        let all = [0, 1, 2, 5];
        assert_eq!(Cores::among(&all, &[]).unwrap(), Cores { generator: 0, forwarder: 1, idle: Some(2) });
        assert_eq!(Cores::among(&all, &[5, 0]).unwrap(), Cores { generator: 5, forwarder: 0, idle: Some(1) });
        let refused =
            |allowed: &[usize], chosen: &[usize]| Cores::among(allowed, chosen).unwrap_err().to_string();
        assert!(refused(&all, &[0, 4]).contains("cannot use core 4: this process may use cores 0,1,2,5"));
        assert!(refused(&all, &[1, 1]).contains("--cores GENERATOR,FORWARDER"));
        assert!(refused(&all, &[1]).contains("--cores GENERATOR,FORWARDER"));
        assert!(refused(&[3], &[]).contains("cannot measure on one core"));
    }

    #[test]
    fn shared_cores_and_distant_nics_are_said() {
        let sysfs = two_nodes();
        let nic = |node| PciInfo { numa_node: node, ..some_nic(sysfs.path()) };
        let said = |generator, forwarder, node| {
            let cores = Cores { generator, forwarder, idle: None };
            cores.warnings(sysfs.path(), [nic(node)].iter())
        };
        assert_eq!(said(0, 1, Some(1)), Vec::<String>::new());
        assert_eq!(said(0, 1, None), Vec::<String>::new());
        assert!(said(0, 2, None)[0].starts_with("cores 0 and 2 are threads of one core (cpus 0,2)"));
        let far = said(1, 0, Some(1));
        assert!(far[0].contains("core 0 is on node 0") && far[0].contains("at distance 21"), "{far:?}");
        let cores = Cores { generator: 0, forwarder: 1, idle: None };
        assert_eq!(cores.fact(sysfs.path()), "generator 0 (node 0), forwarder 1 (node 1)");
    }
}
