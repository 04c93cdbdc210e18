//! Runs the program itself with wrong command lines and with output that nobody reads. It must print one
//! line, exit with the right code and not panic.

use std::ffi::OsString;
use std::fs::File;
use std::io::{BufRead, BufReader, Read};
use std::os::unix::ffi::OsStringExt;
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

fn l2fwd() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_vireo-l2fwd"));
    command.stdin(Stdio::null());
    command
}

/// Checks the exit code, and that standard error is exactly one line, which this returns.
fn refused(output: &Output, code: i32) -> String {
    let text = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(code), "{text}");
    let line = text.strip_prefix("vireo-l2fwd: ").and_then(|rest| rest.strip_suffix('\n')).unwrap_or("");
    assert!(!line.is_empty() && !line.contains('\n') && line.len() < 500, "{text}");
    line.to_owned()
}

#[test]
fn a_wrong_word_is_named_with_what_would_be_right() {
    let cpus = vireo_eal::args::allowed_cpus().unwrap();
    let cores = format!("use cores {}", vireo_eal::args::ranges(&cpus));
    let huge = "9".repeat(10_000);
    for (words, named, right) in [
        (&["--lcors", "1"][..], "'--lcors'", "did you mean --lcores?"),
        (&["--vfio-mod=cdev"], "'--vfio-mod'", "did you mean --vfio-mode?"),
        (&["-l", "99"], "core 99", &*cores),
        (&["-l", "1-"], "\"1-\"", &*cores),
        (&["-l", ""], "\"\"", &*cores),
        (&["-l", &*huge], "\"9999", &*cores),
        (&["-l", "0,0"], "lcore 0", &*cores),
        (&["-l"], "--lcores", "see: vireo-l2fwd --help"),
        (&["-l", "0", "-l", "0"], "--lcores", "see: vireo-l2fwd --help"),
        (&["-m", "0"], "'0'", "1..=4294967295"),
        (&["--vfio-mode", "fast"], "\"fast\"", "use one of auto, container"),
        (&["--proc-type", "tertiary"], "\"tertiary\"", "use primary, secondary or auto"),
        (&["-a", "zz"], "\"zz\"", "ls /sys/bus/pci/devices"),
        (&["--vdev", "net_virtio0"], "\"net_virtio0\"", "net_virtio_user0"),
        (&["--vdev", "net_vhost0,ifac=/a"], "\"ifac=/a\"", "known keys: iface"),
        (&["--no-pci", "--", "-p", "xyz"], "'xyz'", "hexadecimal mask"),
        (&["--no-pci", "--", "-p", &*huge], "'9999", "hexadecimal mask"),
        (&["--no-pci", "--", "-p", "3", "-q", "99"], "'99'", "1..=15"),
        (&["--no-pci", "--", "-p", "3", "--portmp", "(0,1)"], "'--portmp'", "did you mean --portmap?"),
        (&["--no-pci", "--", "-p", "3", "-T", "soon"], "'soon'", "from 0 to 86399"),
        (&["--no-pci", "--", "-p", "3", "--total-num-mbufs", "2097152"], "'2097152'", "1..=2097151"),
        (&["--vfio-fds", &*huge], "\"9999", "it is 10000 bytes long, but a socket path has at most 107"),
        (&["--no-pci", "--"], "-p", "see: vireo-l2fwd --help"),
    ] {
        let line = refused(&l2fwd().args(words).output().unwrap(), 64);
        assert!(line.contains(named) && line.contains(right), "{named}: {line}");
    }
}

#[test]
fn odd_bytes_are_named() {
    let odd = || OsString::from_vec(vec![b'-', b'p', 0xff]);
    let line = refused(&l2fwd().arg(odd()).output().unwrap(), 64);
    assert_eq!(line, "EAL argument \"-p\u{fffd}\": not valid UTF-8");
    let line = refused(&l2fwd().args(["--no-pci", "--"]).arg(odd()).output().unwrap(), 64);
    assert_eq!(line, "argument after -- \"-p\u{fffd}\": not valid UTF-8");
}

#[test]
fn a_virtual_port_is_not_shared_among_processes() {
    let dir = tempfile::tempdir().unwrap();
    let vdev = format!("net_vhost0,iface={},queues=2", dir.path().join("socket").display());
    let output = l2fwd()
        .args(["-l", "0", "--no-pci", "--no-huge", "--in-memory", "--vdev", &vdev, "--"])
        .args(["-p", "1", "-q", "2", "--queues", "2", "--num-procs", "2"])
        .output()
        .unwrap();
    let line = refused(&output, 64);
    assert!(line.starts_with("cannot share port 0") && line.ends_with("leave --num-procs out"), "{line}");
}

#[test]
fn a_mask_of_no_port_names_the_ports() {
    let dir = tempfile::tempdir().unwrap();
    for mask in ["0", "6"] {
        let vdev = format!("net_vhost0,iface={}", dir.path().join("socket").display());
        let output = l2fwd()
            .args(["--no-pci", "--no-huge", "--in-memory", "--vdev", &vdev, "--", "-p", mask])
            .output()
            .unwrap();
        assert!(refused(&output, 64).ends_with("ports are 0 to 0; use -p 1 for all of them"));
        assert!(!dir.path().join("socket").exists());
    }
}

#[test]
fn no_port_at_all_names_the_command() {
    let output = l2fwd().args(["--no-pci", "--in-memory", "--", "-p", "1"]).output().unwrap();
    assert!(refused(&output, 69).contains("there are no ports; bind NICs to VFIO: vireo-devbind"));
}

#[test]
fn output_that_nobody_takes_ends_it() {
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("socket");
    let vdev = format!("net_vhost0,iface={}", socket.display());
    let running = ["--no-pci", "--no-huge", "--in-memory", "--vdev", &vdev, "--", "-p", "1", "-T", "0.01"];
    let help = ["--help"];
    for words in [&help[..], &running] {
        let full = || File::options().write(true).open("/dev/full").unwrap();
        let line = refused(&l2fwd().args(words).stdout(full()).output().unwrap(), 74);
        assert_eq!(line, "cannot write to standard output: ENOSPC (No space left on device)");
        let (reader, writer) = std::io::pipe().unwrap();
        drop(reader);
        let line = refused(&l2fwd().args(words).stdout(writer).output().unwrap(), 74);
        assert_eq!(line, "cannot write to standard output: EPIPE (Broken pipe)");
        let nobody = l2fwd().args(words).stdout(full()).stderr(full()).status().unwrap();
        assert_eq!(nobody.code(), Some(74));
        assert!(!socket.exists());
    }
}

/// A reader that stops reading.
#[cfg(test)]
mod reader {
    use super::*;

    /// Starts l2fwd on `ports` vhost ports, with a report every millisecond.
    fn reporting(dir: &Path, ports: u32) -> Child {
        let mut command = l2fwd();
        let cpu = vireo_eal::args::allowed_cpus().unwrap()[0];
        let lcores: Vec<String> = (0..ports.div_ceil(15)).map(|lcore| format!("{lcore}@{cpu}")).collect();
        command.args(["--lcores", &lcores.join(","), "--no-pci", "--no-huge", "--in-memory"]);
        for port in 0..ports {
            let socket = dir.join(format!("socket{port}"));
            command.args(["--vdev", &format!("net_vhost{port},iface={}", socket.display())]);
        }
        let mask = format!("{:x}", u64::MAX >> (64 - ports));
        command.args(["--", "-p", &mask, "-q", "15", "--json", "-T", "0.001"]);
        command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap()
    }

    /// Returns the bytes that `child` has written, and the user time of its main thread in ticks.
    fn progress(child: &Child) -> (u64, u64) {
        let word = |file: &str, nth: usize| -> u64 {
            let text = std::fs::read_to_string(format!("/proc/{}/{file}", child.id())).unwrap();
            text.split_whitespace().nth(nth).unwrap().parse().unwrap()
        };
        (word("io", 3), word(&format!("task/{}/stat", child.id()), 13))
    }

    /// Waits until the main lcore of `child` has polled for as long as two hundred reports take, without
    /// printing any of them.
    fn await_full_pipe(child: &Child) {
        let deadline = Instant::now() + Duration::from_secs(60);
        let mut last = progress(child);
        loop {
            let (written, ticks) = progress(child);
            if written != last.0 {
                last = (written, ticks);
            } else if ticks > last.1 + 20 {
                return;
            }
            assert!(Instant::now() < deadline, "it polls no more, or finds room for ever: {last:?}");
            std::thread::yield_now();
        }
    }

    /// Returns whether the line is printed again in each period.
    pub(super) fn is_of_period(line: &serde_json::Value) -> bool {
        line["event"] == "statistics" || line["event"] == "counters"
    }

    /// Lets l2fwd on `ports` ports fill the pipe, reads until more arrives, and lets it fill the pipe again.
    /// Returns the process and all following lines, each of which must be whole.
    pub(super) fn stands_still(dir: &Path, ports: u32) -> (Child, impl Iterator<Item = serde_json::Value>) {
        let mut child = reporting(dir, ports);
        let lines = BufReader::new(child.stdout.take().unwrap()).lines().map(Result::unwrap);
        let mut lines = lines.map(|line| {
            serde_json::from_str::<serde_json::Value>(&line).unwrap_or_else(|error| panic!("{error}: {line}"))
        });
        let statistics = lines.find(|line| line["event"] == "statistics").unwrap();
        assert_eq!(statistics.to_string().len() > 4096, ports > 1);
        await_full_pipe(&child);
        let (full, _) = progress(&child);
        // There is room at the latest when the pipe is empty.
        while progress(&child).0 == full {
            let line = lines.next().unwrap();
            assert!(is_of_period(&line), "{line}");
        }
        await_full_pipe(&child);
        (child, lines)
    }
}

#[test]
fn a_reader_that_stands_still_stops_neither_packets_nor_the_end() {
    let dir = tempfile::tempdir().unwrap();
    let (child, lines) = reader::stands_still(dir.path(), 1);
    interrupt(&child).unwrap();
    let line = refused(&child.wait_with_output().unwrap(), 74);
    assert_eq!(line, "cannot write to standard output: its reader has read nothing for 3 s");
    assert!(reader::is_of_period(&lines.last().unwrap()));
}

#[test]
fn reports_longer_than_a_page_are_whole_or_left_out() {
    let dir = tempfile::tempdir().unwrap();
    let (child, lines) = reader::stands_still(dir.path(), 60);
    interrupt(&child).unwrap();
    assert!(lines.last().unwrap()["event"] == "end");
    assert!(child.wait_with_output().unwrap().status.success());
}

/// Standard output of DPDK's l2fwd (26.11) for these ports, from the first line after the EAL's to the end.
/// The table, which DPDK prints repeatedly, is included once.
const GOLDEN: &str = concat!(
    "MAC updating enabled\n",
    "Notice: odd number of ports in portmask.\n",
    "Lcore CPU: RX port 0 TX port 2\n",
    "Lcore CPU: RX port 2 TX port 0\n",
    "Lcore CPU: RX port 3 TX port 3\n",
    "Initializing port 0... done: \n",
    "Port 0, MAC address: 02:00:00:00:0A:00\n\n",
    "Skipping disabled port 1\n",
    "Initializing port 2... done: \n",
    "Port 2, MAC address: 02:00:00:00:0A:02\n\n",
    "Initializing port 3... done: \n",
    "Port 3, MAC address: 02:00:00:00:0A:03\n\n",
    "\nChecking link statusdone\n",
    "Port 0 Link down\n",
    "Port 2 Link down\n",
    "Port 3 Link down\n",
    "TABLE",
    "\n\nSignal 2 received, preparing to exit...\n",
    "Closing port 0... Done\n",
    "Closing port 2... Done\n",
    "Closing port 3... Done\n",
    "Bye...\n",
);
const TABLE: &str = concat!(
    "\x1b[2J\x1b[1;1H",
    "\nPort statistics ====================================",
    "\nStatistics for port 0 ------------------------------",
    "\nPackets sent:                        0",
    "\nPackets received:                    0",
    "\nPackets dropped:                     0",
    "\nStatistics for port 2 ------------------------------",
    "\nPackets sent:                        0",
    "\nPackets received:                    0",
    "\nPackets dropped:                     0",
    "\nStatistics for port 3 ------------------------------",
    "\nPackets sent:                        0",
    "\nPackets received:                    0",
    "\nPackets dropped:                     0",
    "\nAggregate statistics ===============================",
    "\nTotal packets sent:                  0",
    "\nTotal packets received:              0",
    "\nTotal packets dropped:               0",
    "\n====================================================\n",
);

#[test]
fn the_table_form_is_dpdks_output() {
    let dir = tempfile::tempdir().unwrap();
    let cpus = vireo_eal::args::allowed_cpus().unwrap();
    let last = cpus[cpus.len() - 1];
    let mut command = l2fwd();
    // The main lcore polls. The other one, if the machine has another CPU, is idle.
    let lcores = if last == cpus[0] { last.to_string() } else { format!("{},{last}", cpus[0]) };
    command.args(["-l", &lcores, "--no-pci", "--no-huge", "--in-memory"]);
    for port in 0..4 {
        let socket = dir.path().join(format!("socket{port}"));
        let vdev = format!("net_vhost{port},iface={},mac=02:00:00:00:0a:{port:02x}", socket.display());
        command.args(["--vdev", &vdev]);
    }
    command.args(["--", "-p", "d", "-q", "3", "-T", "0.01", "--output", "table"]);
    let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let mut stdout = child.stdout.take().unwrap();
    let mut text = String::new();
    let mut buffer = [0; 4096];
    // The links never come up. l2fwd waits for them for 9 s, as DPDK's does.
    while !text.contains("Total packets dropped") {
        let count = stdout.read(&mut buffer).unwrap();
        assert!(count > 0, "{text}");
        text += std::str::from_utf8(&buffer[..count]).unwrap();
    }
    interrupt(&child).unwrap();
    stdout.read_to_string(&mut text).unwrap();
    let output = child.wait_with_output().unwrap();
    let log = String::from_utf8(output.stderr).unwrap();
    assert!(output.status.success(), "{log}");

    let (dots, rest) = text.split_once("status").unwrap();
    let text = format!("{dots}status{}", rest.trim_start_matches('.'));
    let once = text.replacen(TABLE, "TABLE", 1).replace(TABLE, "");
    assert_eq!(once, GOLDEN.replace("CPU", &cpus[0].to_string()));
    let says = |line: String| log.lines().any(|said| said == line);
    assert!(says(format!("L2FWD: entering main loop on lcore {}", cpus[0])), "{log}");
    assert!(says(format!("L2FWD:  -- lcoreid={} portid=2", cpus[0])), "{log}");
    assert!(cpus.len() == 1 || says(format!("L2FWD: lcore {last} has nothing to do")), "{log}");
}

#[test]
fn sockets_and_rings_of_virtual_ports_are_checked_first() {
    let dir = tempfile::tempdir().unwrap();
    let socket = |name: &str| dir.path().join(name).display().to_string();
    let first = socket("socket");
    let long = socket(&"x".repeat(120));
    let too_long = format!("it is {} bytes long, but a socket path has at most 107", long.len());
    let ring = "not a power of two from 1 to 32768";
    let wrong = |device: &str, why: &str| (vec![device.to_owned()], why.to_owned());
    let both = |other: &str| {
        let devices = vec![format!("net_vhost0,iface={first}"), other.to_owned()];
        (devices, format!("net_vhost0 on this command line also listens at {first}"))
    };
    for (devices, why) in [
        wrong(&format!("net_vhost0,iface={long}"), &too_long),
        wrong(&format!("net_virtio_user0,path={long}"), &too_long),
        wrong(&format!("net_virtio_user0,path={long},server=1"), &too_long),
        wrong(&format!("net_virtio_user0,path={first},queue_size=65536"), ring),
        wrong(&format!("net_virtio_user0,path={first},queue_size=3"), ring),
        wrong(&format!("net_virtio_user0,path={first},queue_size=0"), ring),
        both(&format!("net_vhost1,iface={first}")),
        both(&format!("net_vhost1,iface={}", socket("./socket"))),
        both(&format!("net_virtio_user0,path={first},server=1")),
    ] {
        let mut command = l2fwd();
        command.args(["--no-pci", "--no-huge", "--in-memory"]);
        command.args(devices.iter().flat_map(|device| ["--vdev", device]));
        let line = refused(&command.args(["--", "-p", "1"]).output().unwrap(), 64);
        assert!(line.contains(&why), "{devices:?}: {line}");
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0, "{devices:?}");
    }
}

fn interrupt(child: &Child) -> nix::Result<()> {
    kill(Pid::from_raw(child.id().cast_signed()), Signal::SIGINT)
}

#[test]
fn a_signal_ends_the_wait_for_device_nodes() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("socket");
    let listener = UnixListener::bind(&path).unwrap();
    let mut command = l2fwd();
    command.args(["--in-memory", "--no-huge", "--vfio-fds"]).arg(&path).args(["--", "-p", "1"]);
    let child = command.stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap();
    let _silent = listener.accept().unwrap();
    // The connection is established. The wait for its answer comes next.
    std::thread::sleep(Duration::from_millis(300));
    let since = Instant::now();
    interrupt(&child).unwrap();
    let line = refused(&child.wait_with_output().unwrap(), 69);
    assert!(line.contains("stopped by a signal") && since.elapsed() < Duration::from_secs(5), "{line}");
}

#[test]
fn only_descriptors_from_before_the_start_are_taken() {
    let program = env!("CARGO_BIN_EXE_vireo-l2fwd");
    for (descriptor, code, why) in [
        ("3</dev/null", 77, "it is not a VFIO or iommufd node"),
        ("3<&-", 64, "LISTEN_FDS is 1, but descriptor 3 was not open at start-up"),
    ] {
        let line = format!(
            "export LISTEN_PID=$$ LISTEN_FDS=1; exec {program} --in-memory --vfio-fds listen -- -p 1 {descriptor}"
        );
        let line = refused(&Command::new("sh").args(["-c", &line]).output().unwrap(), code);
        assert!(line.contains(why), "{line}");
    }
}
