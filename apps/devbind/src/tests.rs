use std::fs;
use std::os::unix::fs::symlink;
use std::path::Path;

use vireo_bus_pci::Bus;
use vireo_eal::args::parse_plain;
use vireo_eal::bdf::Bdf;
use vireo_eal::vfio::no_group;
use vireo_eal::{ErrorKind, Result};

use crate::host::Host;
use crate::{Cli, status};

const NIC: &str = "0000:00:03.0";
const OTHER: &str = "0000:00:03.1";

/// A machine in a directory. Its kernel does nothing: a function keeps its driver whatever is written.
fn machine() -> (tempfile::TempDir, Host) {
    let dir = tempfile::tempdir().unwrap();
    let bus = dir.path().join("bus");
    for (address, class) in [(NIC, "0x020000"), (OTHER, "0x020000"), ("0000:00:1f.0", "0x060100")] {
        let device = bus.join("devices").join(address);
        fs::create_dir_all(&device).unwrap();
        for (file, text) in
            [("vendor", "0x8086"), ("device", "0x100e"), ("class", class), ("numa_node", "-1")]
        {
            fs::write(device.join(file), text).unwrap();
        }
        fs::write(device.join("driver_override"), "").unwrap();
        symlink("../../drivers/e1000", device.join("driver")).unwrap();
        let group = dir.path().join("groups/7");
        fs::create_dir_all(group.join("devices").join(address)).unwrap();
        symlink(&group, device.join("iommu_group")).unwrap();
    }
    for driver in ["e1000", "vfio-pci"] {
        fs::create_dir_all(bus.join("drivers").join(driver)).unwrap();
    }
    fs::write(bus.join("drivers_probe"), "").unwrap();
    fs::create_dir_all(dir.path().join("proc/net")).unwrap();
    let host = Host {
        bus: Bus::new(bus),
        vfio: "/dev/vfio".into(),
        proc: dir.path().join("proc"),
        records: dir.path().join("run/vireo-devbind"),
    };
    (dir, host)
}

fn address(text: &str) -> Bdf {
    text.parse().unwrap()
}

fn with_interface(dir: &Path, state: &str, route: &str) {
    let net = dir.join("bus/devices").join(NIC).join("virtio3/net/eth7");
    fs::create_dir_all(&net).unwrap();
    fs::write(net.join("operstate"), state).unwrap();
    fs::write(dir.join("proc/net/route"), format!("Iface\tDestination\n{route}\t00000000\n")).unwrap();
}

#[test]
fn lists_ethernet_controllers_only() {
    let (dir, host) = machine();
    with_interface(dir.path(), "up\n", "eth7");
    let nics = status::list(&host).unwrap();
    assert_eq!(nics.iter().map(|nic| nic.address.as_str()).collect::<Vec<_>>(), [NIC, OTHER]);
    assert_eq!((nics[0].vireo, nics[0].iommu_group, nics[0].numa_node), (Some("e1000"), Some(7), None));
    assert!(nics[0].active && !nics[1].active);
    let table = status::table(&nics);
    assert!(table.lines().nth(1).unwrap().ends_with("eth7 (active)"), "{table}");
    assert!(status::json(&nics).unwrap().contains("\"iommu_group\": 7"));
    assert!(status::table(&[]).contains("no Ethernet"));
}

#[test]
fn a_nic_in_use_is_refused_without_force() {
    let (dir, host) = machine();
    with_interface(dir.path(), "up\n", "eth7");
    let error = host.change(&[address(NIC)], None, false).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Busy);
    assert!(error.to_string().contains("eth7 is up and has routes"), "{error}");
    host.change(&[address(NIC)], None, true).unwrap();

    for (state, route) in [("down\n", "eth7"), ("up\n", "eth70")] {
        with_interface(dir.path(), state, route);
        host.change(&[address(NIC)], None, false).unwrap();
    }
    // What a driver leaves that does not tell.
    with_interface(dir.path(), "unknown\n", "eth7");
    host.change(&[address(NIC)], None, false).unwrap_err();
}

#[test]
fn a_nic_with_routes_of_ipv6_alone_is_in_use() {
    let (dir, host) = machine();
    with_interface(dir.path(), "up\n", "eth70");
    let routed = |destination: &str, length: &str, flags: &str| {
        let zero = "0".repeat(32);
        let line = format!(
            "{destination:0<32} {length} {zero} 00 {zero} 00000100 00000001 00000000 {flags}     eth7\n"
        );
        fs::write(dir.path().join("proc/net/ipv6_route"), line).unwrap();
        host.change(&[address(NIC)], None, false).is_err()
    };
    for (destination, length, flags) in
        [("fd00", "40", "00000001"), ("2001", "80", "00000001"), ("", "00", "00450003")]
    {
        assert!(routed(destination, length, flags), "{destination}/{length}");
    }
    for (destination, length, flags) in [
        ("fe80", "40", "00000001"),
        ("ff", "08", "00000001"),
        ("fd00", "80", "80200001"),
        ("fd00", "80", "00300001"),
        ("", "00", "00200200"),
    ] {
        assert!(!routed(destination, length, flags), "{destination}/{length}");
    }
}

#[test]
fn a_nic_below_an_interface_with_routes_is_in_use() {
    let (dir, host) = machine();
    let net = dir.path().join("net");
    // The kernel makes no loops; if it did, following these would take ages.
    for (lower, upper) in [
        ("bond0", "br0"),
        ("bond0", "br0.5"),
        ("br0", "bond0"),
        ("br0", "br0.5"),
        ("br0.5", "bond0"),
        ("br0.5", "br0"),
    ] {
        fs::create_dir_all(net.join(lower)).unwrap();
        symlink(net.join(upper), net.join(lower).join(format!("upper_{upper}"))).unwrap();
    }
    with_interface(dir.path(), "up\n", "br0.5");
    host.change(&[address(NIC)], None, false).unwrap();
    symlink(net.join("bond0"), dir.path().join("bus/devices").join(NIC).join("virtio3/net/eth7/upper_bond0"))
        .unwrap();
    let error = host.change(&[address(NIC)], None, false).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Busy);
    assert!(error.to_string().contains("eth7 is up and carries br0.5, which has routes"), "{error}");
    assert!(error.to_string().contains("ip link set eth7 down"), "{error}");
    for (state, route) in [("down\n", "br0.5"), ("up\n", "lo")] {
        with_interface(dir.path(), state, route);
        host.change(&[address(NIC)], None, false).unwrap();
    }
}

#[test]
fn the_first_driver_is_recorded_until_it_is_back() {
    let (_dir, host) = machine();
    let nic = address(NIC);
    assert_eq!(host.restore(&[nic], false).unwrap_err().kind(), ErrorKind::Unavailable);
    host.change(&[nic], None, false).unwrap();
    host.change(&[nic], None, false).unwrap();
    assert_eq!(host.recorded(nic).unwrap().as_deref(), Some("e1000"));
    assert!(status::table(&status::list(&host).unwrap()).contains("(was e1000)"));
    host.restore(&[nic], false).unwrap();
    assert_eq!(host.recorded(nic).unwrap(), None);
}

#[test]
fn what_fails_leaves_no_record() {
    let (dir, host) = machine();
    let missing = host.change(&[address(NIC)], Some("vfio-user"), false).unwrap_err();
    assert!(missing.to_string().ends_with("run: modprobe vfio-user"), "{missing}");
    let refused = host.change(&[address(NIC), address(OTHER)], Some("vfio-pci"), false).unwrap_err();
    assert!(refused.to_string().contains("did not take it"), "{refused}");
    assert!(host.change(&[address(NIC), address("0000:00:09.0")], None, false).is_err());
    assert_eq!(host.recorded(address(NIC)).unwrap(), None);

    fs::remove_file(dir.path().join("bus/devices").join(NIC).join("iommu_group")).unwrap();
    let refused = host.change(&[address(NIC)], Some("vfio-pci"), false).unwrap_err();
    assert_eq!(refused, no_group(format!("cannot bind {NIC} to vfio-pci")));
}

#[test]
fn a_process_that_has_the_nic_is_named() {
    let (dir, host) = machine();
    let driver = dir.path().join("bus/devices").join(NIC).join("driver");
    fs::remove_file(&driver).unwrap();
    symlink("../../drivers/vfio-pci", &driver).unwrap();
    let process = dir.path().join("proc/4711");
    fs::create_dir_all(process.join("fd")).unwrap();
    fs::write(process.join("comm"), "vireo-l2fwd\n").unwrap();
    symlink("/dev/vfio/7", process.join("fd/5")).unwrap();
    let error = host.change(&[address(NIC)], Some("e1000"), true).unwrap_err();
    assert!(error.to_string().contains("in use by pid 4711 (vireo-l2fwd)"), "{error}");
}

#[test]
fn arguments() {
    let read = |line: &str| -> Result<Cli> {
        let argv = ["devbind"].into_iter().chain(line.split_whitespace()).map(Into::into);
        let cli: Cli = parse_plain(argv)?.unwrap();
        cli.check().map(|()| cli)
    };
    assert!(read("").unwrap().addresses.is_empty());
    assert_eq!(read("-b vfio-pci 00:03.0 00:03.1").unwrap().addresses.len(), 2);
    for line in [
        "--bind vfio-pci",
        "--unbind",
        "--restore",
        "00:03.0",
        "--bind a --unbind 00:03.0",
        "-u nope",
        "-s 00:03.0",
    ] {
        let error = read(line).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Usage, "{line}");
        assert!(!error.to_string().contains('\n'), "{error}");
    }
}
