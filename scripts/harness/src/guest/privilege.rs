//! Running without root: nodes that only root may open, passed to an unprivileged user; privileges dropped
//! after the start; and the sandbox, which names the system calls that it denies.

use std::path::PathBuf;
use std::process::Command;

use anyhow::{Result, ensure};

use super::Boot;
use super::machine::{NICS, NOBODY, Nic, Role, cdev_nodes, group_nodes, need_mode, removed, with_mode};
use super::refuse::{one_line, refused_as};
use super::traffic::{carries, forwarder, one_port, ports, starts_again};
use crate::case::{Cases, Context, read};
use crate::l2fwd::{Ended, L2fwd, Start};
use crate::process::{PATIENCE, Process, await_that, run};

const MODES: [&str; 3] = ["container", "cdev", "compat"];

/// Makes all nodes accessible to root only, until the guard is dropped.
fn closed_nodes() -> Result<impl Drop> {
    let mut nodes = [group_nodes()?, cdev_nodes()?].concat();
    nodes
        .extend(["/dev/iommu", "/dev/vfio/vfio"].map(PathBuf::from).into_iter().filter(|node| node.exists()));
    with_mode(&nodes, 0o600)
}

/// Checks lines of `/proc/PID/status` in all threads of a running l2fwd.
fn status_is(l2fwd: &L2fwd, wanted: &[(&str, &str)]) -> Result<()> {
    for task in std::fs::read_dir(format!("/proc/{}/task", l2fwd.process.pid()))? {
        let status = read(task?.path().join("status"))?;
        for (name, value) in wanted {
            let line = status.lines().find_map(|line| line.strip_prefix(&format!("{name}:")));
            let found = line.unwrap_or_default().split_whitespace().collect::<Vec<_>>().join(" ");
            ensure!(found == *value, "a thread has {name} '{found}', not '{value}'");
        }
    }
    Ok(())
}

fn has_no_privilege(l2fwd: &L2fwd) -> Result<()> {
    let ids = [NOBODY; 4].map(|id| id.to_string()).join(" ");
    let none = "0000000000000000";
    let sets = ["CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"].map(|set| (set, none));
    status_is(l2fwd, &sets)?;
    status_is(l2fwd, &[("Uid", &ids), ("Gid", &ids), ("Groups", ""), ("NoNewPrivs", "1"), ("Seccomp", "2")])
}

/// Runs l2fwd through the launcher as an unprivileged user, on a machine where only root may open the nodes.
fn launched(context: &Context, boot: Boot, (rx, tx): (Nic, Nic), eal: &str, devices: &str) -> Result<Ended> {
    let _closed = closed_nodes()?;
    let _runtime = removed("/tmp/vireo-65534");
    let launch = context.program("launch").to_string_lossy().into_owned();
    let start = Start::new(format!("-l 1 {eal} {devices} -- -p 3 -q 2 -T 0"));
    let l2fwd = start.under([launch.as_str(), "--user", "nobody"]).forwarding(context)?;
    has_no_privilege(&l2fwd)?;
    carries(context, boot.generator_mode(), rx, tx)?;
    l2fwd.stop()
}

pub(super) fn cases(cases: &mut Cases, boot: Boot) {
    for mode in MODES {
        for nic in NICS {
            let case = cases
                .add(
                    format!("{} as nobody, nodes passed by LISTEN_FDS, {mode}", nic.name()),
                    move |context| launched_in(context, boot, mode, nic, ""),
                )
                .in_full_if(nic == Nic::E1000 || nic == Nic::E1000e && mode != "cdev");
            if nic == Nic::VirtioNet {
                case.on_both_kernels();
            }
        }
        cases.add(format!("e1000e as nobody with --isolate-ports, {mode}"), move |context| {
            launched_in(context, boot, mode, Nic::E1000e, "--isolate-ports")
        });
        cases.add(format!("as nobody, nodes passed by a socket, {mode}"), move |context| {
            by_socket(context, boot, mode)
        });
        gives_up_root(cases, boot, mode, Nic::VirtioNet);
        gives_up_root(cases, boot, mode, Nic::E1000e);
    }
    let nic = Nic::E1000e;
    cases.add("as nobody, both ports in auto", move |context| {
        let ended = launched(context, boot, (nic, nic), "", &ports(nic, nic))?;
        // Both ports use the same iommufd.
        ended.opened(0, "cdev", "auto: ")?;
        ended.opened(1, "cdev", "auto: ")
    });
    for other in ["compat", "container"] {
        cases.add(format!("as nobody, ports in cdev and {other}"), move |context| {
            let (rx, tx) = (nic.bdf(Role::FwdRx), nic.bdf(Role::FwdTx));
            let devices = format!("-a {rx},vfio-mode=cdev -a {tx},vfio-mode={other}");
            launched(context, boot, (nic, nic), "", &devices).map(drop)
        });
    }
    sandbox(cases, "cdev");
    passed_descriptors(cases);
    for (name, user, text) in [
        ("no such --user", "no-such", "there is no such user"),
        ("--user root", "root", "is root, which keeps every privilege"),
    ] {
        cases.add(format!("refused: {name}"), move |context| {
            let arguments = format!("--user {user} -a {} -- -p 1", nic.bdf(Role::FwdRx));
            refused_as(context, ("root", ""), &arguments, (64, text))?;
            starts_again(context, boot.generator_mode())
        });
    }
    launch_refused(cases, "a launch without devices", (69, "select no device"), |_| {
        "l2fwd --no-pci -- -p 1".into()
    });
    launch_refused(cases, "a launch of no program", (69, "cannot start"), |nic| format!("no-such -a {nic}"));
}

pub(super) fn cases_without_iommu(cases: &mut Cases, boot: Boot) {
    for mode in ["noiommu", "noiommu-cdev"] {
        gives_up_root(cases, boot, mode, Nic::E1000e);
    }
    sandbox(cases, "noiommu");
    launch_refused(cases, "a launch in mode noiommu", (77, "CAP_SYS_RAWIO"), |nic| {
        format!("l2fwd --vfio-mode noiommu -a {nic}")
    });
}

fn launched_in(context: &Context, boot: Boot, mode: &str, nic: Nic, eal: &str) -> Result<()> {
    let eal = format!("{eal} --vfio-mode {mode}");
    launched(context, boot, (nic, nic), &eal, &ports(nic, nic))?.opened(0, mode, "as requested")
}

/// Runs l2fwd, which the user starts and which connects to the launcher.
fn by_socket(context: &Context, boot: Boot, mode: &str) -> Result<()> {
    let nic = Nic::E1000e;
    let _closed = closed_nodes()?;
    let _runtime = removed("/tmp/vireo-65534");
    let socket = removed("/tmp/nodes.socket");
    let devices = format!("--vfio-mode {mode} {}", ports(nic, nic));
    let mut command = Command::new(context.program("launch"));
    command.args(["--user", "nobody", "--socket"]).arg(&*socket).arg("l2fwd");
    let mut launcher =
        Process::spawn(context, "launch", command.args(devices.split_whitespace()).args(["--", "-p", "3"]))?;
    await_that("the launcher's socket", PATIENCE, || socket.exists())?;
    // Another user is refused, and the launcher keeps waiting.
    let fds = format!("--vfio-fds {} {devices} --", socket.display());
    let other = format!("--file-prefix other {fds} -p 3");
    refused_as(context, ("root", ""), &other, (77, "they are for another user"))?;
    let as_nobody = "ulimit -l unlimited; exec su nobody -s /bin/sh -c \"exec $*\"";
    let start = Start::new(format!("-l 1 {fds} -p 3 -q 2 -T 0")).under(["sh", "-c", as_nobody, "sh"]);
    let l2fwd = start.forwarding(context)?;
    let ids = [NOBODY; 4].map(|id| id.to_string()).join(" ");
    status_is(&l2fwd, &[("Uid", &ids), ("CapEff", "0000000000000000")])?;
    carries(context, boot.generator_mode(), nic, nic)?;
    ensure!(launcher.wait(PATIENCE)? == 0, "the launcher failed");
    ensure!(!socket.exists(), "the socket was left behind");
    l2fwd.stop()?;
    Ok(())
}

fn gives_up_root(cases: &mut Cases, boot: Boot, mode: &'static str, nic: Nic) {
    let case = cases.add(format!("--user nobody, {}, {mode}", nic.name()), move |context| {
        need_mode(mode)?;
        let _runtime = removed("/var/run/vireo/fwd");
        let arguments =
            format!("-l 0-1 --user nobody --vfio-mode {mode} {} -- -p 3 -q 1 -T 0", ports(nic, nic));
        let l2fwd = Start::new(arguments).forwarding(context)?;
        has_no_privilege(&l2fwd)?;
        carries(context, boot.generator_mode(), nic, nic)?;
        l2fwd.stop()?;
        // The process without privileges could not remove its runtime directory. The next start takes it over
        // silently.
        forwarder(mode, nic, nic).forwarding(context)?.stop()?;
        Ok(())
    });
    case.in_full_if(nic == Nic::E1000e && matches!(mode, "container" | "compat"));
}

fn sandbox(cases: &mut Cases, mode: &'static str) {
    cases.add("--no-sandbox", move |context| {
        let nic = Nic::E1000e.bdf(Role::FwdRx);
        let start = Start::new(format!("-l 1 --no-sandbox --vfio-mode {mode} -a {nic} -- -p 1 -T 0"));
        let l2fwd = start.forwarding(context)?;
        status_is(&l2fwd, &[("Seccomp", "0"), ("NoNewPrivs", "0")])?;
        l2fwd.stop()?;
        let l2fwd = one_port(mode).forwarding(context)?;
        status_is(&l2fwd, &[("Seccomp", "2"), ("NoNewPrivs", "1")])?;
        l2fwd.stop()?;
        Ok(())
    });
    for (call, word) in [("socket", "socket"), ("openat", "open")] {
        cases.add(format!("the sandbox names a denied {word}"), move |context| {
            let text = format!("EAL: the sandbox denies the system call {call} (");
            let ended = forbidden(context, "", word, 77)?;
            ensure!(ended.stderr.lines().any(|line| line.starts_with(&text)), "the call is not named");
            forbidden(context, "--no-sandbox", word, 0).map(drop)
        });
    }
    cases.add("the sandbox lets threads free memory", |context| forbidden(context, "", "heap", 0).map(drop));
    // Landlock denies with an errno: the program goes on, and the file stays.
    cases.add("the sandbox keeps files", |context| {
        let file = removed("/tmp/vireo-forbidden");
        std::fs::write(&*file, "")?;
        ensure!(
            forbidden(context, "", "unlink", 0)?.stdout.contains("PermissionDenied"),
            "the program removed a file"
        );
        forbidden(context, "--no-sandbox", "unlink", 0)?;
        ensure!(!file.exists(), "also denied without the sandbox");
        Ok(())
    });
}

fn forbidden(context: &Context, option: &str, word: &str, code: i32) -> Result<crate::process::Ended> {
    let mut command = Command::new(context.program("forbidden"));
    command.arg("--in-memory").args(option.split_whitespace()).args(["--", word]);
    run(context, "forbidden", &mut command)?.expect(code)
}

/// Adds cases with wrong values of `LISTEN_PID` (`$$` is the program's own pid), `LISTEN_FDS` and the file
/// that is open as descriptor 3.
fn passed_descriptors(cases: &mut Cases) {
    for (name, pid, fds, file, code, text) in [
        ("LISTEN_FDS of another process", "1", "1", "/dev/null", 64, "they are for pid 1 "),
        ("LISTEN_FDS that is no number", "$$", "two", "/dev/null", 64, "not 1 to 253"),
        (
            "fewer descriptors than LISTEN_FDS",
            "$$",
            "9",
            "/dev/iommu",
            64,
            "descriptor 4 was not open at start-up",
        ),
        ("a descriptor that is no node", "$$", "1", "/dev/null", 77, "not a VFIO or iommufd node"),
        ("the wrong node", "$$", "1", "/dev/iommu", 77, "not among the descriptors of --vfio-fds"),
    ] {
        cases.add(format!("refused: {name}"), move |context| {
            let l2fwd = context.program("l2fwd");
            let script = format!(
                "export LISTEN_PID={pid} LISTEN_FDS={fds}; exec {} --vfio-fds listen -a {} -- -p 1 3<{file}",
                l2fwd.display(),
                Nic::E1000e.bdf(Role::FwdRx)
            );
            let ended = run(context, "refused", Command::new("sh").args(["-c", &script]))?.expect(code)?;
            one_line(&ended.stderr, "vireo-l2fwd", text).map(drop)
        });
    }
}

fn launch_refused(
    cases: &mut Cases,
    name: &str,
    (code, text): (i32, &'static str),
    arguments: fn(&str) -> String,
) {
    cases.add(format!("refused: {name}"), move |context| {
        let mut command = Command::new(context.program("launch"));
        let arguments = arguments(&Nic::E1000e.bdf(Role::FwdRx));
        command.args(["--user", "nobody"]).args(arguments.split_whitespace());
        let ended = run(context, "refused", &mut command)?.expect(code)?;
        one_line(&ended.stderr, "vireo-launch", text).map(drop)
    });
}
