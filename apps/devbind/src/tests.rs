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

/// Creates a machine in a directory. It has no kernel that reacts: a function keeps its driver, whatever is
/// written.
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
        noiommu: dir.path().join("noiommu_mode"),
        pci_ids: vec![dir.path().join("pci.ids")],
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

fn select(host: &Host, words: &str) -> Result<Vec<Bdf>> {
    host.select(&words.split_whitespace().map(str::to_owned).collect::<Vec<_>>())
}

#[test]
fn nics_are_chosen_by_address_interface_and_pattern() {
    let (dir, host) = machine();
    with_interface(dir.path(), "up\n", "lo");
    let [nic, other] = [address(NIC), address(OTHER)];
    for (words, chosen) in [
        ("00:03.1 eth7", vec![other, nic]),
        ("eth7 0000:00:03.0 00:03.?", vec![nic, other]),
        ("00:03.*", vec![nic, other]),
        ("0000:00:0[0-3].1", vec![other]),
        // The bridge at 00:1f.0 is not a NIC: only its address selects it.
        ("*", vec![nic, other]),
        ("00:1f.0", vec![address("0000:00:1f.0")]),
    ] {
        assert_eq!(select(&host, words).unwrap(), chosen, "{words}");
    }
    for (word, kind, text) in [
        ("eth70", ErrorKind::Unavailable, "no PCI device has a network interface of that name"),
        ("00:1f.*", ErrorKind::Unavailable, "no Ethernet controller has a matching address"),
        ("00:0[3.0", ErrorKind::Usage, "it is not a valid pattern"),
        ("00:03", ErrorKind::Usage, "PCI address"),
    ] {
        let error = select(&host, word).unwrap_err();
        assert_eq!(error.kind(), kind, "{error}");
        assert!(error.to_string().contains(text) && error.hint().is_some(), "{error}");
    }
}

#[test]
fn devices_have_names_where_pci_ids_is_installed() {
    let (dir, host) = machine();
    let table = || status::table(&status::list(&host).unwrap());
    assert!(!table().contains("DEVICE"));
    fs::write(dir.path().join("pci.ids"), "8086  Intel Corporation\n\t100e  82540EM Gigabit\n").unwrap();
    assert!(table().lines().nth(1).unwrap().ends_with("82540EM Gigabit"), "{}", table());
    assert!(status::json(&status::list(&host).unwrap()).unwrap().contains("\"name\": \"82540EM Gigabit\""));
}

#[test]
fn noiommu_mode_is_allowed_only_for_a_change_that_succeeds() {
    let (dir, host) = machine();
    let (nic, switch) = (address(NIC), dir.path().join("noiommu_mode"));
    let value = || fs::read_to_string(&switch).unwrap();
    // With an IOMMU, the switch stays unchanged.
    fs::write(&switch, "N\n").unwrap();
    host.change_without_iommu(&[nic], "e1000", false).unwrap();
    assert_eq!(value(), "N\n");
    fs::remove_file(dir.path().join("bus/devices").join(NIC).join("iommu_group")).unwrap();
    host.change_without_iommu(&[nic], "e1000", false).unwrap();
    assert_eq!(value(), "1");
    fs::write(&switch, "N\n").unwrap();
    host.change_without_iommu(&[nic], "vfio-pci", false).unwrap_err();
    assert_eq!(value(), "N");
    fs::remove_file(&switch).unwrap();
    let error = host.change_without_iommu(&[nic], "e1000", false).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unavailable);
    assert!(error.to_string().contains("CONFIG_VFIO_NOIOMMU"), "{error}");
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
    // A driver that does not report the state leaves this value.
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
    // The kernel creates no loops. If it did, following every path through these would take too long.
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
fn a_member_of_a_bond_or_bridge_is_refused_with_its_master() {
    let (dir, host) = machine();
    // The interface has no routes of its own: a bridge carries the traffic of other interfaces.
    with_interface(dir.path(), "up\n", "lo");
    let net = dir.path().join("net");
    let link = dir.path().join("bus/devices").join(NIC).join("virtio3/net/eth7/master");
    for (master, dirs, text) in [
        ("bond3", "bonding", "eth7 is a member of the bond bond3"),
        ("br7", "bridge", "eth7 is a member of the bridge br7"),
        ("ovs-system", "statistics", "eth7 is a member of ovs-system"),
    ] {
        fs::create_dir_all(net.join(master).join(dirs)).unwrap();
        let _ = fs::remove_file(&link);
        symlink(net.join(master), &link).unwrap();
        let error = host.change(&[address(NIC)], None, false).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Busy);
        assert!(error.to_string().contains(text), "{error}");
        assert!(error.to_string().contains("ip link set eth7 nomaster"), "{error}");
        assert!(status::list(&host).unwrap()[0].active);
    }
    host.change(&[address(NIC)], None, true).unwrap();
}

#[test]
fn a_nic_in_another_network_namespace_is_refused() {
    let (dir, host) = machine();
    // For an interface that has moved, sysfs shows an empty directory of its class.
    fs::create_dir_all(dir.path().join("bus/devices").join(NIC).join("virtio3/net")).unwrap();
    let error = host.change(&[address(NIC)], None, false).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Busy);
    assert!(error.to_string().contains("its interface is in another network namespace"), "{error}");
    host.change(&[address(NIC)], None, true).unwrap();
    let nics = status::list(&host).unwrap();
    assert!(nics[0].active && !nics[1].active);
}

#[test]
fn a_physical_function_is_refused_while_its_virtual_functions_are_bound() {
    let (dir, host) = machine();
    let devices = dir.path().join("bus/devices");
    symlink(devices.join(OTHER), devices.join(NIC).join("virtfn0")).unwrap();
    let error = host.change(&[address(NIC)], None, false).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Busy);
    assert!(error.to_string().contains(&format!("virtual functions are bound: {OTHER} (e1000)")), "{error}");
    assert!(error.to_string().contains(&format!("vireo-devbind --unbind {OTHER}")), "{error}");
    host.change(&[address(NIC)], None, true).unwrap();

    // A process that has a virtual function open keeps the kernel waiting, even with `force`.
    fs::remove_file(devices.join(OTHER).join("driver")).unwrap();
    symlink("../../drivers/vfio-pci", devices.join(OTHER).join("driver")).unwrap();
    let process = dir.path().join("proc/4711");
    fs::create_dir_all(process.join("fd")).unwrap();
    fs::write(process.join("comm"), "qemu\n").unwrap();
    symlink("/dev/vfio/7", process.join("fd/5")).unwrap();
    let error = host.change(&[address(NIC)], None, true).unwrap_err();
    assert!(error.to_string().contains(&format!("{OTHER} is in use by pid 4711 (qemu)")), "{error}");

    fs::remove_dir_all(process).unwrap();
    fs::remove_file(devices.join(OTHER).join("driver")).unwrap();
    host.change(&[address(NIC)], None, false).unwrap();
}

#[test]
fn a_missing_sysfs_is_not_an_empty_list() {
    let (dir, host) = machine();
    fs::remove_dir_all(dir.path().join("bus")).unwrap();
    for error in [status::list(&host).unwrap_err(), select(&host, "00:03.*").unwrap_err()] {
        assert_eq!(error.kind(), ErrorKind::Unavailable);
        assert!(error.to_string().contains("bus/devices does not exist"), "{error}");
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
    assert!(refused.to_string().contains("did not bind to it"), "{refused}");
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
    assert!(read("").unwrap().nics.is_empty());
    assert_eq!(read("-b vfio-pci 00:03.0 eth0 00:0d.*").unwrap().nics.len(), 3);
    assert_eq!(read("-b none eth0").unwrap().driver(), None);
    read("--status-dev net --json").unwrap();
    read("--noiommu-mode -b vfio-pci eth0").unwrap();
    for line in [
        "--bind vfio-pci",
        "--unbind",
        "--restore",
        "00:03.0",
        "--bind a --unbind 00:03.0",
        "-s 00:03.0",
        "--status-dev net 00:03.0",
        "--status-dev crypto",
        "--status-dev net --force",
        "--noiommu-mode -u eth0",
    ] {
        let error = read(line).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Usage, "{line}");
        assert!(!error.to_string().contains('\n'), "{error}");
    }
}
