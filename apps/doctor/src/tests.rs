use std::fs;
use std::os::unix::fs::symlink;
use std::path::Path;

use vireo_bus_pci::Bus;
use vireo_eal::args::parse_plain;
use vireo_eal::vfio::{LiveUpdate, VfioMode};
use vireo_eal::{ErrorKind, Result};

use crate::Cli;
use crate::examine::{Host, Nic, examine};
use crate::machine::Machine;
use crate::report::Report;

const NIC: &str = "0000:00:03.0";

/// Creates a machine in a directory, with an IOMMU, VFIO and one NIC on e1000e.
fn machine() -> (tempfile::TempDir, Host) {
    let root = tempfile::tempdir().unwrap();
    let bus = root.path().join("bus");
    function(&bus, NIC, "0x020000", "0x10d3");
    function(&bus, "0000:00:1f.0", "0x060100", "0x2918");
    symlink("../../drivers/e1000e", bus.join("devices").join(NIC).join("driver")).unwrap();
    symlink("/sys/kernel/iommu_groups/7", bus.join("devices").join(NIC).join("iommu_group")).unwrap();
    for driver in ["e1000e", "vfio-pci"] {
        fs::create_dir_all(bus.join("drivers").join(driver)).unwrap();
    }
    fs::create_dir_all(root.path().join("dev/vfio")).unwrap();
    fs::write(root.path().join("dev/vfio/vfio"), "").unwrap();
    fs::write(root.path().join("dev/iommu"), "").unwrap();
    let host = Host { bus: Bus::new(bus), root: root.path().into(), vf_token: None };
    (root, host)
}

fn function(bus: &Path, address: &str, class: &str, device: &str) {
    let dir = bus.join("devices").join(address);
    fs::create_dir_all(&dir).unwrap();
    for (file, text) in [("vendor", "0x8086"), ("device", device), ("class", class)] {
        fs::write(dir.join(file), text).unwrap();
    }
}

fn on_driver(root: &Path, driver: Option<&str>) {
    let link = root.join("bus/devices").join(NIC).join("driver");
    fs::remove_file(&link).unwrap();
    if let Some(driver) = driver {
        symlink(format!("../../drivers/{driver}"), link).unwrap();
    }
}

/// Returns the refusal of the NIC in `mode` on one line, as a program would print the error.
fn refusal(host: &Host, mode: VfioMode) -> String {
    let mut nics = examine(host, &[NIC.parse().unwrap()], &[mode]).unwrap();
    let verdict = nics.remove(0).modes.remove(0);
    assert!(!verdict.usable);
    let refusal = verdict.refusal.unwrap();
    format!("{}: {}; {}", refusal.what, refusal.why, refusal.hint.unwrap_or_default())
}

fn report(nics: Vec<Nic>) -> Report {
    let machine = Machine {
        kernel: "7.3.4".into(),
        iommu: vec!["dmar0".into()],
        hugepages: "64 of 64 free of 2048 KiB".into(),
        memlock_kib: Some(8192),
        noiommu_allowed: Some(false),
        live_update: LiveUpdate::Off,
        uid: 1000,
    };
    Report { machine, nics }
}

#[test]
fn lists_ethernet_controllers_only() {
    let (_root, host) = machine();
    let nics = examine(&host, &[], &VfioMode::EXPLICIT).unwrap();
    assert_eq!(nics.iter().map(|nic| nic.address.as_str()).collect::<Vec<_>>(), [NIC]);
    assert_eq!((nics[0].driver, nics[0].iommu_group), (Some("e1000"), Some(7)));
    assert_eq!(
        nics[0].modes.iter().map(|v| v.mode).collect::<Vec<_>>(),
        VfioMode::EXPLICIT.map(VfioMode::name)
    );
    let error = examine(&host, &["00:09.0".parse().unwrap()], &VfioMode::EXPLICIT).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unavailable);
}

#[test]
fn a_nic_with_another_driver_is_told_how_to_be_bound() {
    let (root, host) = machine();
    for mode in [VfioMode::Container, VfioMode::Cdev, VfioMode::Compat] {
        assert_eq!(
            refusal(&host, mode),
            format!(
                "cannot use {NIC}: it is bound to the kernel driver e1000e; run: vireo-devbind --bind vfio-pci {NIC}"
            )
        );
    }
    on_driver(root.path(), None);
    fs::remove_dir(root.path().join("bus/drivers/vfio-pci")).unwrap();
    fs::remove_file(root.path().join("dev/vfio/vfio")).unwrap();
    let text = refusal(&host, VfioMode::Container);
    assert!(
        text.contains("it is bound to no driver, and vfio-pci is not loaded; run: modprobe vfio-pci && "),
        "{text}"
    );
}

#[test]
fn what_a_bind_would_not_mend_comes_first() {
    let (root, host) = machine();
    assert!(refusal(&host, VfioMode::Noiommu).contains("the device has an IOMMU"));
    fs::remove_file(root.path().join("dev/iommu")).unwrap();
    for mode in [VfioMode::Cdev, VfioMode::Compat] {
        let text = refusal(&host, mode);
        assert!(text.ends_with("run: modprobe iommufd, or choose --vfio-mode container"), "{text}");
    }
    assert!(refusal(&host, VfioMode::Container).contains("--bind vfio-pci"));
    fs::remove_file(root.path().join("dev/vfio/vfio")).unwrap();
    assert!(refusal(&host, VfioMode::Container).ends_with("run: modprobe vfio-pci"));
    fs::remove_file(root.path().join("bus/devices").join(NIC).join("iommu_group")).unwrap();
    // Which of the two it is depends on the no-IOMMU switch of the kernel that runs the test.
    let text = refusal(&host, VfioMode::Container);
    assert!(text.contains("it is in no IOMMU group") || text.contains("the device has no IOMMU"), "{text}");
}

#[test]
fn what_no_driver_knows_is_no_mode_s_fault() {
    let (root, host) = machine();
    fs::write(root.path().join("bus/devices").join(NIC).join("device"), "0xffff").unwrap();
    for mode in VfioMode::EXPLICIT {
        assert_eq!(refusal(&host, mode), format!("cannot use {NIC}: no driver supports 8086:ffff; "));
    }
}

/// The device nodes are plain files here, so a start fails at its first ioctl.
#[test]
fn a_nic_on_vfio_pci_is_tried() {
    let (root, host) = machine();
    on_driver(root.path(), Some("vfio-pci"));
    fs::write(root.path().join("dev/vfio/7"), "").unwrap();
    let text = refusal(&host, VfioMode::Container);
    assert!(text.starts_with("cannot read the state of IOMMU group 7: ENOTTY"), "{text}");
    assert!(refusal(&host, VfioMode::Cdev).ends_with("use --vfio-mode container"));
    let nics = examine(&host, &[], &[VfioMode::Container]).unwrap();
    assert_eq!(nics[0].modes[0].refusal.as_ref().unwrap().errno.as_deref(), Some("ENOTTY"));
}

#[test]
fn text_and_json_say_the_same() {
    let (_root, host) = machine();
    let mut report = report(examine(&host, &[], &[VfioMode::Container, VfioMode::Cdev]).unwrap());
    assert!(!report.usable());
    report.nics[0].modes[1].usable = true;
    report.nics[0].modes[1].refusal = None;
    assert!(report.usable());
    assert_eq!(
        report.text(),
        format!(
            "\
kernel          7.3.4
IOMMU           on (dmar0, Intel VT-d)
no-IOMMU mode   not allowed
live update     off, or not supported by this kernel
hugepages       64 of 64 free of 2048 KiB
RLIMIT_MEMLOCK  8192 KiB
user            uid 1000

{NIC} (e1000, 8086:10d3) on e1000e, IOMMU group 7
  container     no: cannot use {NIC}: it is bound to the kernel driver e1000e
                run: vireo-devbind --bind vfio-pci {NIC}
  cdev          usable
"
        )
    );
    let json: serde_json::Value = serde_json::from_str(&report.json().unwrap()).unwrap();
    assert_eq!(
        (&json["machine"]["iommu"][0], &json["machine"]["live_update"]),
        (&"dmar0".into(), &"off".into())
    );
    let nic = &json["nics"][0];
    assert_eq!((&nic["driver"], &nic["kernel_driver"]), (&"e1000".into(), &"e1000e".into()));
    let [container, cdev] = [&nic["modes"][0], &nic["modes"][1]];
    assert_eq!(container["why"], "it is bound to the kernel driver e1000e");
    assert_eq!(container["hint"], format!("run: vireo-devbind --bind vfio-pci {NIC}"));
    assert_eq!(cdev, &serde_json::json!({ "mode": "cdev", "usable": true }));
    report.nics.clear();
    assert!(report.text().ends_with("\nno Ethernet controllers on the PCI bus\n"));
}

#[test]
fn the_machine_is_read() {
    let root = tempfile::tempdir().unwrap();
    assert_eq!(Machine::read(root.path()).unwrap_err().kind(), ErrorKind::Unavailable);
    fs::create_dir_all(root.path().join("proc/sys/kernel")).unwrap();
    fs::write(root.path().join("proc/sys/kernel/osrelease"), "6.12.1\n").unwrap();
    let machine = Machine::read(root.path()).unwrap();
    assert_eq!(machine.kernel, "6.12.1");
    assert!(machine.text().contains("IOMMU           off or not present\n"));
    fs::create_dir(root.path().join("dev")).unwrap();
    fs::write(root.path().join("dev/liveupdate"), "").unwrap();
    let keeps = |symbols: &str, what: &str| {
        fs::write(root.path().join("proc/kallsyms"), symbols).unwrap();
        let text = Machine::read(root.path()).unwrap().text();
        assert!(text.contains(&format!("live update     on; keeps {what}")), "{text}");
    };
    keeps("0 t memfd_luo_preserve\n", "no devices of vfio-pci\n");
    keeps("0 t vfio_pci_liveupdate_preserve [vfio_pci]\n", "devices that are open in mode cdev");
    for name in ["ivhd1", "ivhd0"] {
        fs::create_dir_all(root.path().join("sys/class/iommu").join(name)).unwrap();
    }
    assert!(Machine::read(root.path()).unwrap().text().contains("on (ivhd0, AMD-Vi, ivhd1, AMD-Vi)\n"));
}

#[test]
fn arguments() {
    let read = |line: &str| -> Result<Cli> {
        let argv = ["doctor"].into_iter().chain(line.split_whitespace()).map(Into::into);
        parse_plain(argv).map(Option::unwrap)
    };
    assert_eq!(read("").unwrap().modes(), VfioMode::EXPLICIT);
    let cli = read("--json --modes group,noiommu-cdev 00:03.0 00:04.0").unwrap();
    assert_eq!(cli.modes, [VfioMode::Container, VfioMode::NoiommuCdev]);
    assert!(cli.json && cli.addresses.len() == 2);
    let token = "2ab74924-c335-45f4-9b16-8569e5b08258";
    assert_eq!(
        read(&format!("--vfio-vf-token {token}")).unwrap().vfio_vf_token,
        Some(token.parse().unwrap())
    );
    for line in [
        "nope",
        "--vfio-vf-token 1",
        "--modes",
        "--modes auto",
        "--modes cdev,fast",
        "--modes=",
        "--jason",
        "--json=1",
    ] {
        let error = read(line).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Usage, "{line}");
        assert!(!error.to_string().contains('\n'), "{error}");
    }
    for line in ["--modes auto", "--modes fast"] {
        let error = read(line).unwrap_err().to_string();
        assert!(
            error.ends_with("use one or more of container, cdev, compat, noiommu, noiommu-cdev"),
            "{error}"
        );
    }
}
