use std::os::unix::ffi::OsStringExt;

use proptest::prelude::*;

use super::*;

const USAGE: &str = "l2fwd: -p MASK";

const PROGRAM: Program<'_> = Program {
    usage: Some(|| USAGE.to_owned()),
    device_keys: &["rxd"],
    vdev_keys: &[("net_virtio_user", &["path"]), ("net_vhost", &["iface"])],
    peer_of: Some("l2fwd"),
};

fn outcome(line: &str) -> Result<Outcome> {
    let argv = std::iter::once("/usr/bin/l2fwd").chain(line.split_whitespace()).map(OsString::from).collect();
    parse_on(argv, &PROGRAM, || Ok(vec![0, 1]))
}

fn run(line: &str) -> Parsed {
    match outcome(line).unwrap() {
        Outcome::Run(parsed) => *parsed,
        Outcome::Print(text) => panic!("{text}"),
    }
}

fn printed(line: &str) -> String {
    match outcome(line).unwrap() {
        Outcome::Print(text) => text,
        Outcome::Run(parsed) => panic!("{parsed:?}"),
    }
}

fn refused(line: &str) -> String {
    let error = outcome(line).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Usage, "{line}: {error}");
    let text = error.to_string();
    assert!(!text.contains(char::is_control) && text.len() < 500, "{text:?}");
    text
}

#[test]
fn nothing_given() {
    let Parsed { eal, app } = run("");
    assert_eq!(eal.lcores.iter().map(|spec| spec.id).collect::<Vec<_>>(), [0, 1]);
    assert_eq!(eal.main_lcore, 0);
    assert_eq!(eal.vfio_mode, VfioMode::Auto);
    assert_eq!(eal.file_prefix, "rte");
    assert_eq!(eal.memory, MemoryArgs::default());
    assert_eq!(app, ["/usr/bin/l2fwd"]);
}

#[test]
fn a_line_as_users_type_it() {
    let Parsed { eal, app } = run(
        "-l0-1 -n4 --main-lcore=1 -a 00:03.0,vfio-mode=cdev,rxd=64 -a 0000:00:04.0 -m 512 \
         --file-prefix x --vfio-intr msix --vfio-mode group --log-level=8 --log-level lib.eal:3 -- -p 3 -- -v",
    );
    assert_eq!(eal.main_lcore, 1);
    assert_eq!(eal.mode_of("00:03.0".parse().unwrap()), VfioMode::Cdev);
    assert_eq!(eal.mode_of("00:04.0".parse().unwrap()), VfioMode::Container);
    assert_eq!(eal.memory.megabytes, Some(512));
    assert_eq!(eal.vfio_intr, Some(VfioInterrupt::Msix));
    assert_eq!(eal.log_levels.len(), 2);
    assert_eq!(
        eal.notes,
        ["--memory-channels has no effect: packet buffers are not spread over memory channels"]
    );
    assert_eq!(app, ["/usr/bin/l2fwd", "-p", "3", "--", "-v"]);
}

#[test]
fn what_is_printed() {
    let help = printed("-h");
    assert!(
        help.contains("--vfio-mode") && help.contains("l2fwd [EAL ARGUMENTS] -- ") && help.ends_with(USAGE)
    );
    assert!(!help.contains('\x1b'));
    assert_eq!(printed("--help -- -p 1"), help);
    assert!(printed("--log-level help").contains("8 debug"));
    assert_eq!(printed("-v"), concat!("l2fwd (Vireo ", env!("CARGO_PKG_VERSION"), ")\n"));
    assert!(run("-v -- -p 1").eal.notes[0].starts_with("l2fwd (Vireo"));
}

#[test]
fn the_bad_word_and_the_right_one_are_named() {
    let cases = [
        (
            "--isolate-ports --vfio-mode noiommu",
            "--isolate-ports with VFIO mode noiommu: without an IOMMU, every device reaches all memory; leave --isolate-ports out, or use a mode with an IOMMU",
        ),
        ("--lcors 1", "EAL arguments: unexpected argument '--lcors' found; did you mean --lcores?"),
        (
            "-p 3",
            "EAL arguments: unexpected argument '-p' found; EAL arguments go before --, application arguments after it; see: l2fwd --help",
        ),
        (
            "what",
            "EAL arguments: unexpected argument 'what' found; EAL arguments go before --, application arguments after it; see: l2fwd --help",
        ),
        ("-l 99999", "--lcores \"99999\": core \"99999\" is above the maximum, 8191; use cores 0-1"),
        ("-l 1 --main-lcore 0", "--main-lcore 0: not one of the lcores; use one of 1"),
        (
            "--iova-mode xa",
            "EAL arguments: invalid value 'xa' for '--iova-mode <MODE>' [possible values: pa, va]; see: l2fwd --help",
        ),
        (
            "-m 0",
            "EAL arguments: invalid value '0' for '--memory-size <MB>': 0 is not in 1..=4294967295; see: l2fwd --help",
        ),
        (
            "-l",
            "EAL arguments: a value is required for '--lcores <LIST>' but none was supplied; see: l2fwd --help",
        ),
        (
            "--no-huge --no-huge",
            "EAL arguments: the argument '--no-huge' cannot be used multiple times; see: l2fwd --help",
        ),
        (
            "--vfio-mode iommufd",
            "VFIO mode \"iommufd\": there is no such mode; use one of auto, container (or group), cdev, compat, noiommu, noiommu-cdev",
        ),
        (
            "-b 3",
            "PCI address \"3\": not of the form 0000:00:03.0 or 00:03.0; list addresses with: ls /sys/bus/pci/devices",
        ),
        ("-a 00:03.0 -a 0000:00:03.0,rxd=1", "--allow 0000:00:03.0: the device is given twice"),
        (
            "--vdev net_vhost0,iface=/a --vdev net_vhost0,iface=/b",
            "--vdev net_vhost0: the device is given twice",
        ),
        (
            "--proc-type tertiary",
            "--proc-type \"tertiary\": there is no such type; use primary, secondary or auto",
        ),
        (
            "--proc-type secondary --takeover",
            "--proc-type \"secondary\" with --takeover: a process shares the ports of another one or takes them over; \
             leave one of them out",
        ),
        (
            "--in-memory --proc-type secondary",
            "--proc-type \"secondary\" with --in-memory: processes find each other in the runtime directory; leave one \
             of them out",
        ),
        (
            "--file-prefix a/b",
            "--file-prefix \"a/b\": not a file name of 1 to 64 bytes without control characters; use a name such as vireo1",
        ),
        (
            "--file-prefix a\u{7}b",
            "--file-prefix \"a\\u{7}b\": not a file name of 1 to 64 bytes without control characters; use a name such as vireo1",
        ),
    ];
    for (line, text) in cases {
        assert_eq!(refused(line), text);
    }
}

#[test]
fn conflicts() {
    for line in [
        "-a 00:03.0 -b 00:04.0",
        "-c 1 -l 0",
        "--telemetry --no-telemetry",
        "--no-pci -a 00:03.0",
        "-A -b 00:03.0",
        "--auto-probing --no-auto-probing",
        "-m 64 --numa-mem 64",
        "-m 64 --socket-mem 64",
        "--no-huge --numa-mem 64",
        "--no-huge --huge-unlink",
        "--no-huge --single-file-segments",
        "--no-huge --match-allocations",
        "--legacy-mem --in-memory",
        "--legacy-mem --match-allocations",
        "--in-memory --huge-unlink",
        "--single-file-segments --huge-unlink",
        "--iova-mode va --vfio-mode noiommu",
        "--iova-mode va -a 00:03.0,vfio-mode=noiommu-cdev",
        "--iova-mode pa",
        "--iova-mode pa --vfio-mode cdev",
        "--no-huge --vfio-mode noiommu",
        "-a 00:03.0,vfio-mode=noiommu -a 00:04.0",
        "--vfio-mode noiommu -a 00:03.0,vfio-mode=container -a 00:04.0",
    ] {
        refused(line);
    }
    run("--iova-mode pa --vfio-mode noiommu");
    run("--iova-mode pa --no-pci");
    run("--iova-mode va --vfio-mode compat");
    run("--vfio-mode cdev --iova-mode pa -a 00:03.0,vfio-mode=noiommu");
    run("-a 00:03.0,vfio-mode=cdev -a 00:04.0,vfio-mode=container --no-huge --in-memory");
}

#[test]
fn virtual_devices_go_with_any_choice_of_real_ones() {
    for others in ["", "-a 00:03.0", "-b 00:03.0", "--no-pci", "--no-huge --no-pci --in-memory"] {
        let vdevs = "--vdev net_vhost1,iface=/b --vdev=net_virtio_user0,path=/a";
        let eal = run(&format!("{vdevs} {others}")).eal;
        assert_eq!(
            eal.vdevs.iter().map(ToString::to_string).collect::<Vec<_>>(),
            ["net_vhost1,iface=/b", "net_virtio_user0,path=/a"]
        );
    }
}

#[test]
fn what_has_no_effect_is_noted() {
    let eal = run("--no-huge --huge-dir /mnt --syslog=daemon -r 2 --telemetry --no-shconf").eal;
    assert_eq!(eal.memory.huge_dir, None);
    assert_eq!(eal.notes.len(), 5);
    assert_eq!(run("-c 0x2").eal.warnings, ["--coremask is deprecated; use -l 1"]);
}

#[test]
fn neither_odd_bytes_nor_huge_words_nor_no_words_panic() {
    let bytes = vec!["x".into(), OsString::from_vec(vec![b'-', b'l', 0xff])];
    let error = parse_on(bytes, &PROGRAM, || Ok(vec![0])).unwrap_err();
    assert_eq!(error.to_string(), "EAL argument \"-l\u{fffd}\": not valid UTF-8");

    let after: Vec<OsString> = vec!["x".into(), "--".into(), OsString::from_vec(vec![0xff])];
    assert!(parse_on(after, &PROGRAM, || Ok(vec![0])).is_ok());

    for argument in
        ["-l", "-c", "-a", "-b", "-m", "--huge", "--vfio-mode", "--vfio-vf-token", "--log-level", "--vdev"]
    {
        refused(&format!("{argument} {}", "z".repeat(100_000)));
    }
    assert!(parse_on(Vec::new(), &PROGRAM, || Ok(vec![0])).is_ok());
}

proptest! {
    #[test]
    fn no_line_panics(words in prop::collection::vec("-[a-z]|--[a-z-]{0,12}(=.{0,5})?|.{0,8}", 0..6)) {
        let argv = std::iter::once("x".to_owned()).chain(words).map(OsString::from).collect();
        if let Err(error) = parse_on(argv, &PROGRAM, || Ok(vec![0, 1])) {
            prop_assert!(!error.to_string().contains('\n'));
        }
    }
}

#[test]
fn privileges() {
    let eal = run("--vfio-fds=listen --user nobody:nogroup --no-sandbox").eal;
    assert_eq!(eal.vfio_fds, Some(crate::vfio::FdSource::Listen));
    assert_eq!(eal.user, "nobody:nogroup".parse().ok());
    assert!(eal.no_sandbox);
    assert_eq!(run("--vfio-fds /run/x").eal.vfio_fds, Some(crate::vfio::FdSource::Socket("/run/x".into())));
    let eal = run("").eal;
    assert_eq!((eal.vfio_fds, eal.user, eal.no_sandbox), (None, None, false));
    assert!(refused("--vfio-fds=").contains("give listen"));
    assert!(refused("--user :0").contains("USER:GROUP"));
}

/// What Vireo does with a DPDK argument.
#[derive(Debug)]
enum Becomes {
    /// Vireo implements the argument.
    Honoured,
    /// Vireo accepts the argument, and a note says that it has no effect.
    NoEffect,
    /// Vireo refuses the argument, and the hint contains this text.
    Refused(&'static str),
}

/// Every spelling of every EAL argument of DPDK 26.11 (`lib/eal/common/eal_option_list.h`).
#[test]
fn every_eal_argument_of_dpdk() {
    use Becomes::{Honoured, NoEffect, Refused};
    const TOKEN: &str = "--vfio-vf-token=14d63f20-8445-11ea-8900-1f9ce7d5650d";
    let builtin = "drivers are built in";
    let service = "-l";
    let trace = "--log-level";
    for (spellings, becomes) in [
        (&["-a 00:03.0", "--allow 00:03.0", "--allow=00:03.0,rxd=1", "-a00:03.0"][..], Honoured),
        (&["-b 00:03.0", "--block 00:03.0", "--block=00:03.0"], Honoured),
        (&["--auto-probing"], NoEffect),
        (&["-A", "--no-auto-probing", "-A -a 00:03.0"], Honoured),
        (&["--base-virtaddr 0x100000000", "--base-virtaddr=0x100000000"], NoEffect),
        (&["-c 3", "--coremask 0x3", "--coremask=3"], Honoured),
        (&["-d /a.so", "-d", "--driver-path /a", "--driver-path=/a", "-d/a -d/b"], Refused(builtin)),
        (&["--force-max-simd-bitwidth 64", "--force-max-simd-bitwidth=512"], NoEffect),
        (&["--huge-unlink", "--huge-unlink=always", "--huge-unlink=existing"], NoEffect),
        (&["--huge-unlink=never"], Refused("leave it out")),
        (&["--in-memory", "--no-huge", "--no-pci"], Honoured),
        (&["--iova-mode va", "--iova-mode=va"], Honoured),
        (&["-l 0", "-l0-1", "--lcores 0", "--lcores=0,1"], Honoured),
        (&["--legacy-mem", "--match-allocations", "--single-file-segments"], NoEffect),
        (&["--log-color", "--log-color=auto", "--log-color=always", "--log-color=never"], Honoured),
        (&["--log-level 8", "--log-level=lib.eal:debug"], Honoured),
        (&["--log-timestamp", "--log-timestamp=iso"], Refused("ts(1)")),
        (&["--main-lcore 1", "--main-lcore=0"], Honoured),
        (&["--mbuf-pool-ops-name x", "--mbuf-pool-ops-name=ring_mp_mc"], NoEffect),
        (&["-n 4", "-n4", "--memory-channels 4", "--memory-channels=4"], NoEffect),
        (&["-r 2", "-r2", "--memory-ranks 2", "--memory-ranks=2"], NoEffect),
        (&["-m 64", "-m64", "--memory-size 64", "--memory-size=64"], Honoured),
        (&["--no-hpet", "--no-shconf", "--telemetry", "--vmware-tsc-map"], NoEffect),
        (&["--no-telemetry"], Honoured),
        (&["--proc-type primary", "--proc-type=auto", "--proc-type secondary"], Honoured),
        (&["-R", "-R=4", "--remap-lcore-ids", "--remap-lcore-ids=4"], Honoured),
        (&["-S 1", "-S", "--service-corelist 1", "--service-corelist=1"], Refused(service)),
        (&["-s 2", "-s2", "-s", "--service-coremask 2", "--service-coremask=2"], Refused(service)),
        (&["--vdev net_vhost0,iface=/a", "--vdev=net_vhost0,iface=/a"], Honoured),
        (&["--syslog", "--syslog=daemon"], NoEffect),
        (&["--trace .*", "--trace=lib.eal", "--trace"], Refused(trace)),
        (&["--trace-bufsz 1M", "--trace-bufsz=1M"], Refused(trace)),
        (&["--trace-dir /tmp", "--trace-dir=/tmp"], Refused(trace)),
        (&["--trace-mode o", "--trace-mode=discard"], Refused(trace)),
        (&["--create-uio-dev"], Refused("vireo-devbind --bind vfio-pci")),
        (&["--file-prefix x", "--file-prefix=x"], Honoured),
        (&["--huge-dir /mnt", "--huge-dir=/mnt"], Honoured),
        (&["--huge-worker-stack", "--huge-worker-stack=64"], Refused("leave it out")),
        (&["--numa-mem 64", "--numa-mem=64,0", "--socket-mem 64,64", "--socket-mem=1"], Honoured),
        (&["--numa-limit 64", "--numa-limit=64", "--socket-limit 1,2", "--socket-limit=1"], Refused("-m")),
        (&["--pagesz-mem 2M:64", "--pagesz-mem=1G:1"], Refused("--huge-dir")),
        (&["--vfio-intr msix", "--vfio-intr=legacy"], Honoured),
        (&[TOKEN], Honoured),
    ] {
        for line in spellings {
            let what = format!("{line}: {becomes:?}");
            match (&becomes, outcome(line)) {
                (Honoured, Ok(Outcome::Run(parsed))) => {
                    assert!(parsed.eal.notes.is_empty(), "{what}: {:?}", parsed.eal.notes);
                }
                (NoEffect, Ok(Outcome::Run(parsed))) => {
                    let name = line.split(['=', ' ']).next().filter(|name| name.starts_with("--"));
                    let notes = parsed.eal.notes;
                    assert!(
                        notes.len() == 1 && notes[0].contains(name.unwrap_or_default()),
                        "{what}: {notes:?}"
                    );
                }
                (Refused(hint), Err(error)) => {
                    let text = error.to_string();
                    assert_eq!(error.kind(), ErrorKind::Usage, "{what}");
                    let named = text.contains("Vireo does not support this DPDK argument; ");
                    assert!(named && text.contains(hint), "{what}: {text}");
                }
                (_, other) => panic!("{what}: {other:?}"),
            }
        }
    }
    for line in ["-v", "--version", "-h", "--help"] {
        printed(line);
    }
}

#[test]
fn memory_of_nodes() {
    let memory = run("--socket-mem 1024,0 -l 0 --no-pci -- -p 1").eal.memory;
    assert_eq!((memory.socket_mem, memory.megabytes), (vec![1024, 0], Some(1024)));
    assert_eq!(run("--numa-mem=1,2,3").eal.memory.megabytes, Some(6));
    for text in ["", ",", "1,", "a", "-1", "0", "0,0", "4294967295,1", "18446744073709551616", "1;2"] {
        assert!(refused(&format!("--socket-mem={text}")).contains("64,64"), "{text}");
    }
}

#[test]
fn lcores_get_new_ids() {
    let ids = |line: &str| run(line).eal.lcores.iter().map(ToString::to_string).collect::<Vec<_>>();
    assert_eq!(ids("-l 1 -R"), ["0@1"]);
    assert_eq!(ids("-l 0-1 --remap-lcore-ids=8 --main-lcore 9"), ["8@0", "9@1"]);
    assert_eq!(ids("-R=3"), ["3@0", "4@1"]);
    for line in ["-R=x", "-R=-1", "-R=8191", "-l 0@1 -R", "-l (0,1) -R", "-l 1 -R --main-lcore 1"] {
        refused(line);
    }
}

#[test]
fn no_device_is_probed_by_itself() {
    assert!(run("-A").eal.no_pci && run("-A --vdev net_vhost0,iface=/a").eal.no_pci);
    let eal = run("-A -a 00:03.0").eal;
    assert!(!eal.no_pci && eal.allow.len() == 1);
}
