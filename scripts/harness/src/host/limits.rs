//! Memory that the machine cannot give. Tested only in a control group, because outside of one the kernel
//! would kill other processes.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result, ensure};

use super::rings::{End, prefix};
use crate::case::{Cases, Context, skip, write};
use crate::l2fwd::Start;
use crate::process::run;

/// A memory control group with a limit, removed on drop.
struct Group {
    dir: PathBuf,
    limit: PathBuf,
}

impl Group {
    /// Creates a group limited to `megabytes` MiB. The error tells why this machine cannot have one.
    fn new(context: &Context, megabytes: u64) -> Result<Self> {
        let name = format!("vireo-case-{}", context.unique());
        let v1 = Path::new("/sys/fs/cgroup/memory");
        let (top, limit) = if v1.exists() {
            (v1, "memory.limit_in_bytes")
        } else {
            (Path::new("/sys/fs/cgroup"), "memory.max")
        };
        let dir = top.join(name);
        fs::create_dir(&dir).with_context(|| format!("cannot create {}", dir.display()))?;
        let group = Self { limit: dir.join(limit), dir };
        write(&group.limit, (megabytes << 20).to_string())?;
        Ok(group)
    }

    /// Command that runs its arguments in the group.
    fn enter(&self) -> [String; 4] {
        let enter = format!("echo $$ > {}/cgroup.procs && exec \"$@\"", self.dir.display());
        ["sh".into(), "-c".into(), enter, "sh".into()]
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        let _ = fs::remove_dir(&self.dir);
    }
}

pub(super) fn cases(cases: &mut Cases) {
    cases.add("refused: memory beyond a control group's, until the command that it names", in_a_group);
}

fn in_a_group(context: &Context) -> Result<()> {
    let group = match Group::new(context, 64) {
        Ok(group) => group,
        Err(error) => return skip(format!("no memory control group: {error:#}")),
    };
    let start = |eal: &str, app: &str| {
        let devices = End::Vhost.devices(&context.dir, 1, "");
        let line = format!("-l 0 {} {devices} {eal} -- -p 1 -T 0 {app}", prefix("limits"));
        Start::new(line).under(group.enter())
    };
    let limit = group.limit.display().to_string();
    let mut command = String::new();
    for (eal, app) in [("", "--total-num-mbufs 2097151"), ("-m 200", "")] {
        let ended = start(eal, app).spawn(context)?.wait()?;
        let lines = ended.complaints();
        ensure!(ended.code == 71 && lines.len() == 1, "exit code {}: {lines:?}", ended.code);
        let end = lines[0].split_once("; run: ").map(|(_, end)| end).context("no command")?;
        command = end.split_once("; or ").map_or(end, |(command, _)| command).to_owned();
        ensure!(command.contains(&limit), "it names another limit: {}", lines[0]);
    }
    run(context, "hint", Command::new("sh").args(["-c", &command]))?.expect(0)?;
    start("-m 200", "").forwarding(context)?.stop()?;
    Ok(())
}
