//! Shortages of a machine: memory of every kind, cores, room for output.

use std::path::Path;
use std::process::{Command, Stdio};

use anyhow::{Context as _, Result, ensure};
use scopeguard::guard;

use super::Boot;
use super::doctor::{unusable, unusable_as};
use super::machine::{Nic, Role, hugepages, mounted, nodes_of, owned_by_nobody, set, set_hugepages};
use super::refuse::{one_line, refused_as};
use super::traffic::{one_port, ports, starts_again};
use crate::case::{Cases, Context, skip};
use crate::l2fwd::Start;
use crate::process::{PATIENCE, Process, run};

const ROOT: (&str, &str) = ("root", "");

fn nic() -> String {
    Nic::E1000e.bdf(Role::FwdRx)
}

pub(super) fn no_hugepages(cases: &mut Cases, mode: &'static str) {
    cases.add("refused: no hugepages, too few hugepages", move |context| {
        let enough = guard(hugepages("nr_hugepages")?, |before| {
            let _ = set_hugepages(before);
        });
        for few in [0, 4] {
            set_hugepages(few)?;
            let text = format!("are needed and {few} of {few} are free; run: sysctl vm.nr_hugepages=");
            unusable(context, mode, &nic(), (71, &text))?;
        }
        drop(enough);
        starts_again(context, mode)
    });
}

/// Checks that l2fwd refuses `--huge-dir` with the directory `at`.
fn huge_dir(context: &Context, boot: Boot, at: &Path, (code, text): (i32, &str)) -> Result<String> {
    let arguments =
        format!("--huge-dir {} --vfio-mode {} -a {} -- -p 1", at.display(), boot.generator_mode(), nic());
    refused_as(context, ROOT, &arguments, (code, text))
}

pub(super) fn huge_dirs(cases: &mut Cases, boot: Boot) {
    let at = |context: &Context| context.path("huge");
    cases.add("refused: --huge-dir that does not exist", move |context| {
        let at = at(context);
        huge_dir(
            context,
            boot,
            &at,
            (74, &format!("; run: mkdir -p {} && mount -t hugetlbfs", at.display())),
        )?;
        starts_again(context, boot.generator_mode())
    });
    cases.add("refused: --huge-dir that is no mount", move |context| {
        std::fs::create_dir(at(context))?;
        let text = "it is not a hugetlbfs mount; run: mount -t hugetlbfs none";
        huge_dir(context, boot, &at(context), (74, text))?;
        starts_again(context, boot.generator_mode())
    });
    cases.add("refused: --huge-dir that is read-only", move |context| {
        let _mount = mounted(context, "-t hugetlbfs -o ro", &at(context))?;
        huge_dir(context, boot, &at(context), (74, "EROFS (Read-only file system)"))?;
        starts_again(context, boot.generator_mode())
    });
    cases.add("refused: --huge-dir that is full, until the command that it names", move |context| {
        let at = at(context);
        let _mount = mounted(context, "-t hugetlbfs -o size=4M", &at)?;
        let text =
            format!("the mount has 2 of 2 free; run: umount {} && mount -t hugetlbfs -o ", at.display());
        let line = huge_dir(context, boot, &at, (74, &text))?;
        let command = line.split_once("; run: ").map(|(_, command)| command).context("no command")?;
        let command = command.split_once("; or ").map_or(command, |(command, _)| command);
        run(context, "hint", Command::new("sh").args(["-c", command]))?.expect(0)?;
        let arguments = format!(
            "-l 1 --huge-dir {} --vfio-mode {} -a {} -- -p 1 -T 0",
            at.display(),
            boot.generator_mode(),
            nic()
        );
        let ended = Start::new(arguments).forwarding(context)?.stop()?;
        let memory = &ended.event("memory")?["memory"];
        ensure!(
            memory.as_str().is_some_and(|name| name.contains("hugetlbfs file")),
            "its memory is {memory}"
        );
        Ok(())
    });
    cases.add("refused: --huge-dir of 1 GiB pages that are not there", move |context| {
        let giant = "/sys/kernel/mm/hugepages/hugepages-1048576kB";
        if !Path::new(giant).exists() {
            return skip("this guest's CPU has no 1 GiB pages");
        }
        let _mount = mounted(context, "-t hugetlbfs -o pagesize=1G", &at(context))?;
        let text = format!("1 page of 1048576 KiB is needed and 0 of 0 are free; run: echo 1 > {giant}");
        huge_dir(context, boot, &at(context), (71, &text))?;
        starts_again(context, boot.generator_mode())
    });
}

/// Adds cases with a low limit of locked memory. Root may lock any amount, so an unprivileged user owns the
/// nodes.
pub(super) fn little_memlock(cases: &mut Cases, boot: Boot) {
    let all = "all processes of this user together";
    for (mode, whose) in [("cdev", all), ("container", "this process, which has"), ("compat", all)] {
        cases
            .add(format!("refused: little memlock, {mode}"), move |context| {
                let _owned = owned_by_nobody(&nodes_of(mode)?)?;
                let text = format!("KiB must be locked and RLIMIT_MEMLOCK is 64 KiB for {whose}");
                let line = unusable_as(context, ("nobody", "ulimit -l 64"), mode, &nic(), (71, &text))?;
                ensure!(
                    line.contains("run: ulimit -l ") && line.contains(", or as root: prlimit"),
                    "no command"
                );
                starts_again(context, boot.generator_mode())
            })
            .on_both_kernels();
    }
}

pub(super) fn entry_limit(cases: &mut Cases, boot: Boot) {
    cases
        .add("refused: no mapping left, container", move |context| {
            let limit = "/sys/module/vfio_iommu_type1/parameters/dma_entry_limit";
            let none = set(limit, "0")?;
            let text = format!("allows, 0; run: echo 65535 > {limit}");
            unusable(context, "container", &nic(), (71, &text))?;
            drop(none);
            starts_again(context, boot.generator_mode())
        })
        .on_both_kernels();
}

pub(super) fn cores(cases: &mut Cases, boot: Boot) {
    cases.add("refused: a core outside the affinity", move |context| {
        let mut command = Command::new("taskset");
        command.arg("2").arg(context.program("l2fwd")).args(["-l", "0", "-a", &nic(), "--", "-p", "1"]);
        let ended = run(context, "refused", &mut command)?.expect(64)?;
        let text = "core 0 is outside the affinity or cpuset of the process; use cores 1";
        one_line(&ended.stderr, "vireo-l2fwd", text).map(drop)
    });
    cases.add("a core that is offline, and a single core", move |context| {
        let _offline = set("/sys/devices/system/cpu/cpu1/online", "0")?;
        let arguments = format!("-l 1 -a {} -- -p 1", nic());
        refused_as(context, ROOT, &arguments, (64, "core 1 is offline; use cores 0"))?;
        let pair = ports(Nic::E1000e, Nic::E1000e);
        let arguments = format!("--vfio-mode {} {pair} -- -p 3 -q 2 -T 0", boot.generator_mode());
        Start::new(arguments).forwarding(context)?.stop()?;
        Ok(())
    });
}

/// Adds a case that writes to `/dev/full`, then to a pipe whose reader goes away. The next start must find
/// the NICs stopped.
pub(super) fn output_fails(cases: &mut Cases, boot: Boot) {
    cases.add("output that nobody takes", move |context| {
        let full = || std::fs::OpenOptions::new().write(true).open("/dev/full").map(Stdio::from);
        let mut doctor = Command::new(context.program("doctor"));
        let mut process =
            Process::spawn_to(context, "doctor", doctor.args(["--modes", "container", &nic()]), full()?)?;
        ensure!(process.wait(PATIENCE)? == 74, "the doctor did not exit with 74");

        let start = one_port(boot.generator_mode());
        let mut process = Process::spawn_to(context, "full", &mut start.command(context), full()?)?;
        ensure!(process.wait(PATIENCE)? == 74, "l2fwd did not exit with 74");
        let text = "cannot write to standard output: ENOSPC (No space left on device)";
        one_line(&process.stderr()?, "vireo-l2fwd", text)?;

        let (reader, writer) = std::io::pipe()?;
        let arguments = format!("-l 1 --vfio-mode {} -a {} -- -p 1 -T 0.01", boot.generator_mode(), nic());
        let mut command = Start::new(arguments).command(context);
        let mut process = Process::spawn_to(context, "broken", &mut command, writer.into())?;
        // `command` holds a copy of the write end.
        drop(command);
        let mut lines = std::io::BufRead::lines(std::io::BufReader::new(reader));
        lines.find(|line| line.as_ref().map_or(true, |line| line.contains("\"forwarding\"")));
        drop(lines);
        ensure!(process.wait(PATIENCE)? == 74, "l2fwd did not exit with 74 after its reader ended");
        let text = "cannot write to standard output: EPIPE (Broken pipe)";
        one_line(&process.stderr()?, "vireo-l2fwd", text)?;
        starts_again(context, boot.generator_mode())
    });
}
