//! Selects cases, runs them in order on the host and in guests, and deals with those that hang.

use std::collections::{HashMap, VecDeque};
use std::num::NonZeroUsize;
use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use anyhow::{Result, bail};

use crate::agent::Request;
use crate::boot::{Lab, Lost, Session};
use crate::case::{Case, Outcome, Report, Tier};
use crate::clock;
use crate::guest::{BOOTS, Boot};
use crate::host;
use crate::host::stacks;
use crate::process::PATIENCE;
use crate::stop;
use crate::tap::{Progress, Tap};

/// Maximum number of cases that share a guest when several guests run at a time.
const SHARD: usize = 50;
/// Maximum number of times that a case runs again because QEMU lost a timer of its guest.
const REPEATS: u32 = 2;
/// How often a running case is checked against its limit.
const CHECK_INTERVAL: Duration = Duration::from_secs(1);

/// Selection of the user.
#[derive(Clone, Debug, Default)]
pub(crate) struct Choice {
    /// Patterns; the name of a case contains one of them. Empty: all cases.
    pub(crate) only: Vec<String>,
    /// Whether long cases run too.
    pub(crate) full: bool,
    /// Whether the host's cases run.
    pub(crate) host: bool,
    /// Kernels with which the guest is booted, and the name of each in case names: its release up to the
    /// second number.
    pub(crate) kernels: Vec<(String, String)>,
    /// Boots that run. Empty: all boots.
    pub(crate) boots: Vec<Boot>,
}

impl Choice {
    fn wants(&self, name: &str) -> bool {
        self.only.is_empty() || self.only.iter().any(|pattern| name.contains(pattern.as_str()))
    }
}

/// Cases that run together: the host's, or those of a boot of one kernel.
#[derive(Debug)]
struct Group {
    /// Kernel and boot of the guest; `None` for the host.
    guest: Option<(String, Boot)>,
    /// Each case with its full name.
    cases: VecDeque<(String, Arc<Case>)>,
}

/// Groups of the chosen cases, in order.
fn chosen(choice: &Choice, host: Vec<Case>) -> Vec<Group> {
    let mut groups = Vec::new();
    let runs = |case: &Case, first: bool| match case.tier {
        Tier::BothKernels => true,
        Tier::Default => first || choice.full,
        Tier::Short => first && !choice.full,
        Tier::Full => choice.full,
        Tier::FullOnce => first && choice.full,
    };
    let cases = host.into_iter().filter(|case| runs(case, true) && choice.wants(&case.name));
    groups
        .push(Group { guest: None, cases: cases.map(|case| (case.name.clone(), Arc::new(case))).collect() });
    for (number, (kernel, release)) in choice.kernels.iter().enumerate() {
        for boot in BOOTS.into_iter().filter(|boot| choice.boots.is_empty() || choice.boots.contains(boot)) {
            let named = boot
                .cases()
                .0
                .into_iter()
                .map(|case| (format!("{release} {}: {}", boot.name(), case.name), case));
            let cases = named.filter(|(name, case)| runs(case, number == 0) && choice.wants(name));
            let cases = cases.map(|(name, case)| (name, Arc::new(case))).collect();
            groups.push(Group { guest: Some((kernel.clone(), boot)), cases });
        }
    }
    groups.retain(|group| !group.cases.is_empty());
    groups
}

/// Prints the names of the chosen cases.
pub(crate) fn list(choice: &Choice, environment: &host::Environment) -> Result<()> {
    for group in groups(choice, environment)? {
        group.cases.iter().for_each(|(name, _)| println!("{name}"));
    }
    Ok(())
}

/// Returns the groups of the chosen cases. The names of unit tests are known only after their build, so unit
/// tests are left out unless all cases are wanted, a pattern has `::` as their names have, or no other case
/// matches.
fn groups(choice: &Choice, environment: &host::Environment) -> Result<Vec<Group>> {
    let cases = |with_units| -> Result<Vec<Case>> {
        let with_guest = !choice.kernels.is_empty();
        if choice.host { host::cases(environment, with_units, with_guest) } else { Ok(Vec::new()) }
    };
    let asks_for_units = choice.only.is_empty() || choice.only.iter().any(|pattern| pattern.contains("::"));
    let mut groups = chosen(choice, cases(asks_for_units)?);
    if groups.is_empty() && !asks_for_units {
        groups = chosen(choice, cases(true)?);
    }
    if groups.is_empty() {
        let full = if choice.full { "" } else { " without --full" };
        bail!("no case matches '{}'{full}; see: scripts/test --list --full", choice.only.join("' or '"));
    }
    Ok(groups)
}

/// Runs the chosen cases, and returns the exit code.
pub(crate) fn run(
    choice: &Choice,
    environment: &host::Environment,
    (lab, programs): (&Lab, &Path),
    jobs: usize,
) -> Result<u8> {
    let groups = groups(choice, environment)?;
    let tap = Tap::default();
    let mut boots = VecDeque::new();
    let host = Host { full: choice.full, programs, tap: &tap, kills: AtomicUsize::new(0) };
    let (mut on_host, mut long, mut beside) = (VecDeque::new(), VecDeque::new(), Vec::new());
    for Group { guest, mut cases } in groups {
        let Some((kernel, boot)) = guest else {
            for (_, case) in cases {
                match case.tier {
                    _ if case.alongside_guests => beside.push(case),
                    Tier::Default | Tier::BothKernels | Tier::Short => on_host.push_back(case),
                    Tier::Full | Tier::FullOnce => long.push_back(case),
                }
            }
            continue;
        };
        let shard = if jobs > 1 { SHARD } else { usize::MAX };
        while !cases.is_empty() {
            boots.push_back((kernel.clone(), boot, cases.drain(..shard.min(cases.len())).collect()));
        }
    }
    let boots = Mutex::new(boots);
    host.run_in_order(on_host);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            for case in beside.iter().take_while(|_| stop::exit_code().is_none()) {
                if !host.run(case) {
                    host.run(case);
                }
            }
        });
        host.run_in_order(long);
        for _ in 0..jobs {
            scope.spawn(|| {
                let next = || boots.lock().ok()?.pop_front();
                while let Some((kernel, boot, cases)) = next() {
                    run_in_guest(lab, &kernel, boot, cases, &tap);
                }
            });
        }
    });
    if let Some(code) = stop::exit_code() {
        tap.bail_out("stopped by a signal");
        return Ok(code);
    }
    Ok(tap.end())
}

/// Runs cases on the host.
struct Host<'a> {
    full: bool,
    programs: &'a Path,
    tap: &'a Tap,
    /// Number of times that the programs of a hung case were killed, and with them those of its neighbors.
    kills: AtomicUsize,
}

impl Host<'_> {
    /// Runs `cases` one after the other, except for neighbors that run side by side.
    fn run_in_order(&self, mut cases: VecDeque<Arc<Case>>) {
        while let Some(case) = cases.pop_front() {
            let mut together = vec![case];
            while together[0].side_by_side
                && let Some(case) = cases.pop_front_if(|case| case.side_by_side)
            {
                together.push(case);
            }
            self.run_all(together.into());
        }
    }

    /// Runs `cases`, at most one per CPU at a time. Cases that were killed along with another one run again,
    /// alone.
    fn run_all(&self, cases: VecDeque<Arc<Case>>) {
        let cpus = std::thread::available_parallelism().map_or(1, NonZeroUsize::get);
        let jobs = cpus.min(cases.len());
        let (waiting, killed) = (Mutex::new(cases), Mutex::new(Vec::new()));
        let next = || waiting.lock().ok()?.pop_front().filter(|_| stop::exit_code().is_none());
        std::thread::scope(|scope| {
            for _ in 0..jobs {
                scope.spawn(|| {
                    while let Some(case) = next() {
                        if !self.run(&case)
                            && let Ok(mut killed) = killed.lock()
                        {
                            killed.push(case);
                        }
                    }
                });
            }
        });
        for case in killed.into_inner().unwrap_or_default() {
            self.run(&case);
        }
    }

    /// Runs a case in a thread, and reports it. Returns false, without a report, if the case was killed along
    /// with another one. If the case exceeds its limit, the stacks of its programs are reported and the
    /// programs are killed.
    fn run(&self, case: &Arc<Case>) -> bool {
        let kills = || self.kills.load(Ordering::Relaxed);
        let (before, mut progress) = (kills(), Progress::new(&case.name));
        let (to_report, reports) = channel();
        let (of_case, full, programs) = (Arc::clone(case), self.full, self.programs.to_owned());
        std::thread::spawn(move || to_report.send(of_case.run(full, &programs)));
        let mut hung = None;
        let report = loop {
            match reports.recv_timeout(CHECK_INTERVAL) {
                Ok(report) => break report,
                Err(RecvTimeoutError::Disconnected) => {
                    break Report::failed("the thread of the case ended without a report".into());
                }
                Err(RecvTimeoutError::Timeout) => progress.tick(String::new),
            }
            if progress.elapsed() > case.limit && hung.is_none() {
                hung = Some((Instant::now(), stacks::of_descendants()));
                self.kills.fetch_add(1, Ordering::Relaxed);
                stacks::kill_descendants();
            }
            if hung.as_ref().is_some_and(|(since, _)| since.elapsed() > PATIENCE) {
                break Report::failed("the case continued after its programs were killed".into());
            }
        };
        let report = match (hung, &report.outcome) {
            (None, Outcome::Failed(_)) if kills() != before => return false,
            (None, _) => report,
            (Some((_, stacks)), outcome) => {
                let after = if let Outcome::Failed(why) = outcome { why.as_str() } else { "" };
                Report::failed(format!("it took more than {} s\n{stacks}\n{after}", case.limit.as_secs()))
            }
        };
        self.tap.report(&Report { name: case.name.clone(), ..report }, progress.elapsed());
        true
    }
}

/// Runs cases in a guest. If a case ends or hangs the guest, the remaining cases run in a new one. A case
/// during which QEMU lost a timer of the guest also runs again, up to [`REPEATS`] times.
fn run_in_guest(lab: &Lab, kernel: &str, boot: Boot, mut cases: VecDeque<(String, Arc<Case>)>, tap: &Tap) {
    let mut lost: HashMap<String, u32> = HashMap::new();
    let mut again = |name: &str| {
        let count = lost.entry(name.to_owned()).or_default();
        *count += 1;
        *count <= REPEATS
    };
    while !cases.is_empty() && stop::exit_code().is_none() {
        let mut session = match Session::start(lab, kernel, boot) {
            Ok(session) => session,
            Err(error) => {
                for (name, _) in cases {
                    let outcome = Outcome::of(&error);
                    tap.report(&Report { name, outcome, ..Report::default() }, Duration::ZERO);
                }
                return;
            }
        };
        tap.comment(&format!("Linux {}, boot '{}', {} cases", session.release, boot.name(), cases.len()));
        let mut last = None;
        while let Some((name, case)) = cases.pop_front() {
            let progress = Progress::new(&name);
            let request = Request::Case(case.name.clone());
            let (report, goes_on) = match session.request(&request, case.limit, |_| ()) {
                Ok(Report { outcome: Outcome::Failed(why), notes, .. }) if progress.elapsed() > PATIENCE => {
                    // The case waited in vain, possibly because of the guest.
                    let outcome = Outcome::Failed(format!("{why}\n{}", session.stacks()));
                    (Report { name: name.clone(), outcome, notes }, true)
                }
                Ok(report) => (Report { name: name.clone(), ..report }, true),
                Err(lost) => {
                    let why = match lost {
                        Lost::Hung => {
                            format!("it took more than {} s\n{}", case.limit.as_secs(), session.stacks())
                        }
                        Lost::Ended(said) => format!("the guest ended\n{said}"),
                    };
                    (Report { name: name.clone(), ..Report::failed(why) }, false)
                }
            };
            if let Outcome::Failed(why) = &report.outcome
                && let Some(cpu) = clock::stopped(why)
                && again(&name)
            {
                tap.comment(&format!(
                    "QEMU lost the timer of the guest's cpu {cpu}; repeating in a new guest: {name}"
                ));
                cases.push_front((name, case));
                break;
            }
            tap.report(&report, progress.elapsed());
            if !goes_on {
                break;
            }
            if cases.is_empty() {
                last = Some(name);
            }
        }
        if let Some(name) = last
            && let Err(error) = session.finish()
        {
            let name = format!("the end of the boot after {name}");
            tap.report(&Report { name, ..Report::failed(format!("{error:#}")) }, Duration::ZERO);
        }
    }
}
