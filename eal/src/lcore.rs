//! Lcores: pinned threads, one of which is the main thread, and the flag that stops them.

use std::any::Any;
use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::sync::mpsc::sync_channel;
use std::thread::{Builder, JoinHandle, Scope, ScopedJoinHandle};
use std::time::Duration;

use core_affinity::CoreId;
use crossbeam::utils::CachePadded;
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use signal_hook::low_level;

use crate::affinity;
use crate::args::{EalArgs, LcoreSpec, ranges};
use crate::clock;
use crate::error::{Error, ErrorKind, Result};
use crate::event::Event;
use crate::mem::node_of_cpu;
use crate::sync::atomic::{AtomicBool, AtomicI32, Ordering};

#[cfg(test)]
#[cfg(loom)]
mod models;

/// Lcores of the program, as given by `--lcores` and `--main-lcore`.
#[derive(Debug)]
pub struct Lcores {
    main: LcoreSpec,
    workers: Vec<Worker>,
    /// NUMA node of each lcore's first CPU, by id. Read early, because the sandbox closes sysfs.
    nodes: BTreeMap<u32, u32>,
}

#[derive(Debug)]
struct Worker {
    spec: LcoreSpec,
    busy: Busy,
}

/// Description of the lcore that a function runs on, passed to the function.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LcoreContext {
    /// Id of the lcore.
    pub id: u32,
    /// CPUs that its thread is pinned to.
    pub cpus: Vec<usize>,
    /// Whether it is the main lcore.
    pub main: bool,
}

/// Handle of a function that runs on a worker lcore. Dropping it leaves the function running.
#[derive(Debug)]
pub struct Handle<'scope, T> {
    id: u32,
    thread: Thread<'scope, T>,
}

#[derive(Debug)]
enum Thread<'scope, T> {
    Free(JoinHandle<Option<T>>),
    Scoped(ScopedJoinHandle<'scope, Option<T>>),
}

/// Body of a worker thread. It returns `None` if the thread could not be pinned; the launching thread gets
/// that error.
type Body<'scope, T> = Box<dyn FnOnce() -> Option<T> + Send + 'scope>;

impl Lcores {
    /// Creates the lcores of `args`, without starting or pinning a thread.
    ///
    /// # Errors
    /// `Usage` if `main_lcore` is not one of `lcores`.
    pub fn new(args: &EalArgs) -> Result<Self> {
        let (mut main, workers): (Vec<_>, Vec<_>) =
            args.lcores.iter().cloned().partition(|spec| spec.id == args.main_lcore);
        let main = main.pop().ok_or_else(|| {
            Error::new(ErrorKind::Usage, format!("main lcore {}", args.main_lcore), "not one of the lcores")
        })?;
        let node = |spec: &LcoreSpec| Some((spec.id, node_of_cpu(Path::new("/sys"), *spec.cpus.first()?)?));
        Ok(Self {
            nodes: args.lcores.iter().filter_map(node).collect(),
            main,
            workers: workers.into_iter().map(|spec| Worker { spec, busy: Busy::default() }).collect(),
        })
    }

    /// Id of the main lcore.
    pub fn main_id(&self) -> u32 {
        self.main.id
    }

    /// Ids of the worker lcores, in ascending order.
    pub fn worker_ids(&self) -> impl Iterator<Item = u32> {
        self.workers.iter().map(|worker| worker.spec.id)
    }

    /// Ids of all lcores, in ascending order.
    pub fn ids(&self) -> Vec<u32> {
        let mut ids: Vec<u32> = self.worker_ids().chain([self.main.id]).collect();
        ids.sort_unstable();
        ids
    }

    /// CPUs that lcore `id` is pinned to; empty if there is no such lcore.
    pub fn cpus(&self, id: u32) -> &[usize] {
        let worker = self.workers.iter().map(|worker| &worker.spec);
        worker.chain([&self.main]).find(|spec| spec.id == id).map_or(&[], |spec| &spec.cpus)
    }

    /// NUMA node of the first CPU of lcore `id`; `None` on a machine without nodes.
    pub fn node(&self, id: u32) -> Option<u32> {
        self.nodes.get(&id).copied()
    }

    /// CPUs that any lcore is pinned to.
    pub fn all_cpus(&self) -> Vec<usize> {
        self.ids().into_iter().flat_map(|id| self.cpus(id)).copied().collect()
    }

    /// Runs `function` on the main lcore, which is the calling thread. The thread stays pinned.
    ///
    /// # Errors
    /// If the thread cannot be pinned.
    pub fn run_main<T>(&self, function: impl FnOnce(LcoreContext) -> T) -> Result<T> {
        pin(&self.main)?;
        Ok(function(context(&self.main, true)))
    }

    /// Starts `function` in a thread named `vireo-workerID`, pinned to the CPUs of worker `id`.
    ///
    /// # Errors
    /// `Usage` if `id` is not a worker, `Busy` if a function already runs there, otherwise why the thread
    /// cannot be created or pinned.
    pub fn launch<T: Send + 'static>(
        &self,
        id: u32,
        function: impl FnOnce(LcoreContext) -> T + Send + 'static,
    ) -> Result<Handle<'static, T>> {
        self.start(id, function, |builder, body| builder.spawn(body).map(Thread::Free))
    }

    /// Same as [`launch`](Self::launch), but for a function that borrows: `std::thread::scope` waits for it.
    ///
    /// # Errors
    /// Same as [`launch`](Self::launch).
    pub fn launch_in<'scope, T: Send + 'scope>(
        &self,
        scope: &'scope Scope<'scope, '_>,
        id: u32,
        function: impl FnOnce(LcoreContext) -> T + Send + 'scope,
    ) -> Result<Handle<'scope, T>> {
        self.start(id, function, |builder, body| builder.spawn_scoped(scope, body).map(Thread::Scoped))
    }

    fn start<'scope, T, F, S>(&self, id: u32, function: F, spawn: S) -> Result<Handle<'scope, T>>
    where
        T: 'scope,
        F: FnOnce(LcoreContext) -> T + Send + 'scope,
        S: FnOnce(Builder, Body<'scope, T>) -> std::io::Result<Thread<'scope, T>>,
    {
        let what = || format!("cannot launch on lcore {id}");
        let worker = self.workers.iter().find(|worker| worker.spec.id == id).ok_or_else(|| {
            let ids = ranges(&self.worker_ids().map(|id| id as usize).collect::<Vec<_>>());
            Error::new(ErrorKind::Usage, what(), format!("not one of the workers ({ids})"))
        })?;
        let release = worker
            .busy
            .claim()
            .ok_or_else(|| Error::new(ErrorKind::Busy, what(), "it is already running a function"))?;
        let spec = worker.spec.clone();
        let (pinned, is_pinned) = sync_channel(1);
        let body = move || {
            let _release = release;
            let result = pin(&spec);
            let go = result.is_ok();
            // The receiver waits for exactly this message.
            let _ = pinned.send(result);
            go.then(|| function(context(&spec, false)))
        };
        let thread = spawn(Builder::new().name(format!("vireo-worker{id}")), Box::new(body))
            .map_err(|error| Error::io(what(), &error))?;
        is_pinned.recv().map_err(|_| Error::new(ErrorKind::Os, what(), "the thread ended early"))??;
        Ok(Handle { id, thread })
    }
}

impl<T> Handle<'_, T> {
    /// Id of the lcore.
    pub fn id(&self) -> u32 {
        self.id
    }

    /// Returns whether [`join`](Self::join) would return immediately.
    pub fn is_finished(&self) -> bool {
        match &self.thread {
            Thread::Free(thread) => thread.is_finished(),
            Thread::Scoped(thread) => thread.is_finished(),
        }
    }

    /// Waits for the function and returns its result.
    ///
    /// # Errors
    /// `Protocol` (70) with the panic message, if the function panicked.
    pub fn join(self) -> Result<T> {
        let result = match self.thread {
            Thread::Free(thread) => thread.join(),
            Thread::Scoped(thread) => thread.join(),
        };
        let failed = |why| Error::new(ErrorKind::Protocol, format!("lcore {}", self.id), why);
        match result {
            Ok(value) => value.ok_or_else(|| failed("it was not pinned".into())),
            Err(panic) => Err(failed(format!("its thread panicked: {}", message(&*panic)))),
        }
    }
}

fn message(panic: &(dyn Any + Send)) -> &str {
    let text = panic.downcast_ref::<&str>().copied();
    text.or_else(|| panic.downcast_ref::<String>().map(String::as_str)).unwrap_or("no message")
}

/// Whether a function runs on an lcore.
#[derive(Debug, Default)]
struct Busy(Arc<AtomicBool>);

impl Busy {
    /// Claims the lcore until the returned guard is dropped. Returns `None` if the lcore is already claimed.
    fn claim(&self) -> Option<Release> {
        let claimed = self.0.compare_exchange(false, true, Ordering::Acquire, Ordering::Relaxed);
        claimed.is_ok().then(|| Release(Arc::clone(&self.0)))
    }
}

/// Guard that releases the lcore for the next function, even if the last one panicked.
struct Release(Arc<AtomicBool>);

impl Drop for Release {
    fn drop(&mut self) {
        self.0.store(false, Ordering::Release);
    }
}

fn context(spec: &LcoreSpec, main: bool) -> LcoreContext {
    LcoreContext { id: spec.id, cpus: spec.cpus.clone(), main }
}

/// Moves the calling thread to CPUs of the process that are not among `taken`. If there are none, the thread
/// stays where it is.
pub fn keep_off(taken: &[usize]) {
    let mut cpus = affinity::get().unwrap_or_default();
    cpus.retain(|cpu| !taken.contains(cpu));
    // This fails if there are none.
    let _ = affinity::set(&cpus);
}

/// Pins the calling thread to one CPU, for programs that have no EAL arguments.
///
/// # Errors
/// If the CPU is not available to the process.
pub fn pin_to(cpu: usize) -> Result<()> {
    pin(&LcoreSpec { id: cpu as u32, cpus: vec![cpu] })
}

/// Pins the calling thread.
fn pin(spec: &LcoreSpec) -> Result<()> {
    let pinned = match spec.cpus[..] {
        [cpu] if cpu < affinity::CPU_SET_SIZE && core_affinity::set_for_current(CoreId { id: cpu }) => Ok(()),
        // core_affinity panics for a CPU beyond its mask, and does not report why a call failed.
        _ => affinity::set(&spec.cpus),
    };
    pinned.map_err(|errno| {
        Error::os(format!("cannot pin lcore {} to cpus {}", spec.id, ranges(&spec.cpus)), errno)
            .with_hint("compare -l with: taskset -cp $$")
    })
}

/// Flag that asks all lcores to stop, or to interrupt their work briefly (a call). Its clones share one
/// state.
#[derive(Clone, Debug, Default)]
pub struct StopFlag {
    /// 0, `ASKED`, `INTERRUPTED`, or the last signal received. It has its own cache line because every lcore polls
    /// it.
    state: Arc<CachePadded<AtomicI32>>,
    /// Signaled while the flag is raised.
    event: Option<Event>,
}

const ASKED: i32 = -1;
const INTERRUPTED: i32 = -2;

impl StopFlag {
    /// Exit code of a program that a second signal terminates.
    pub const EXIT_CODE: i32 = 130;
    /// Time after the first signal in which a further signal still belongs to the same request.
    pub const SIGNAL_GRACE: Duration = Duration::from_millis(300);

    /// Creates a flag that only the program sets.
    pub fn new() -> Self {
        Self::default()
    }

    /// Creates a flag that only the program sets and that wakes lcores that sleep, see
    /// [`event`](Self::event).
    ///
    /// # Errors
    /// If its event cannot be created.
    pub fn with_event() -> Result<Self> {
        Ok(Self { event: Some(Event::new()?), ..Self::default() })
    }

    /// Creates a flag with an [`event`](Self::event) that SIGINT, SIGTERM and SIGHUP set too. A further signal
    /// more than [`SIGNAL_GRACE`](Self::SIGNAL_GRACE) after the first terminates the process immediately, with
    /// [`EXIT_CODE`](Self::EXIT_CODE). A SIGHUP that was ignored when the program started (nohup(1)) stays
    /// ignored. The handlers are never removed.
    ///
    /// # Errors
    /// `Os` if the handlers cannot be installed or the event cannot be created.
    pub fn on_signals() -> Result<Self> {
        let flag = Self::with_event()?;
        // Time of the first signal, in nanoseconds of the monotonic clock; 0 before the first signal.
        let first = Arc::new(AtomicU64::new(0));
        for signal in [SIGINT, SIGTERM, SIGHUP].into_iter().filter(|signal| !is_ignored_hangup(*signal)) {
            let (raised, first) = (flag.clone(), Arc::clone(&first));
            let handler = move || {
                let now = monotonic();
                if !raised.signalled(signal) {
                    first.store(now, Ordering::Relaxed);
                    return;
                }
                // timeout(1) signals a process and then its group: two signals at once are one request.
                let first = first.load(Ordering::Relaxed);
                if first > 0 && now.saturating_sub(first) > Self::SIGNAL_GRACE.as_nanos() as u64 {
                    low_level::exit(Self::EXIT_CODE);
                }
            };
            // SAFETY: the handler reads a clock, exchanges atomics, writes to an eventfd and calls `_exit`, which are all
            // async-signal-safe (signal-safety(7)), and cannot panic.
            unsafe { low_level::register(signal, handler) }
                .map_err(|error| Error::io(format!("cannot handle signal {signal}"), &error))?;
        }
        Ok(flag)
    }

    /// Asks all lcores to stop.
    pub fn set(&self) {
        // A call may begin and end concurrently. A signal that arrived first stays recorded.
        let asked = |state| matches!(state, 0 | INTERRUPTED).then_some(ASKED);
        let _ = self.state.fetch_update(Ordering::Relaxed, Ordering::Relaxed, asked);
        self.wake();
    }

    /// Returns the event that is signaled while the flag is raised, for an lcore that sleeps; `None` for a flag of
    /// [`new`](Self::new). An lcore that finds the flag not raised, and then waits for the event, misses nothing.
    pub fn event(&self) -> Option<&Event> {
        self.event.as_ref()
    }

    fn wake(&self) {
        if let Some(event) = &self.event {
            event.signal();
        }
    }

    /// Returns whether lcores are asked to stop.
    #[inline]
    pub fn is_set(&self) -> bool {
        !matches!(self.state.load(Ordering::Relaxed), 0 | INTERRUPTED)
    }

    /// Returns whether lcores are asked to stop or to interrupt their work. A loop tests one word for both,
    /// with one relaxed load.
    #[inline]
    pub fn is_raised(&self) -> bool {
        self.state.load(Ordering::Relaxed) != 0
    }

    /// Asks the lcores to interrupt their work, unless they are asked to stop.
    pub fn interrupt(&self) {
        self.change(0, INTERRUPTED);
        self.wake();
    }

    /// Ends a [`interrupt`](Self::interrupt).
    pub fn resume(&self) {
        self.change(INTERRUPTED, 0);
        if let Some(event) = &self.event {
            event.take();
            // What was taken may be the signal of a stop that came after the change.
            if self.is_raised() {
                event.signal();
            }
        }
    }

    fn change(&self, from: i32, to: i32) {
        let _ = self.state.compare_exchange(from, to, Ordering::Relaxed, Ordering::Relaxed);
    }

    /// Records a signal. Returns whether another signal came before.
    fn signalled(&self, signal: i32) -> bool {
        let before = self.state.swap(signal, Ordering::Relaxed);
        self.wake();
        before > 0
    }

    /// Number of the last signal received, if any.
    pub fn signal(&self) -> Option<i32> {
        Some(self.state.load(Ordering::Relaxed)).filter(|state| *state > 0)
    }
}

/// Nanoseconds of the monotonic clock, never 0.
fn monotonic() -> u64 {
    clock::monotonic().as_nanos() as u64 + 1
}

/// Returns whether `signal` is a SIGHUP that was ignored when the program started (`SigIgn`,
/// proc_pid_status(5)).
fn is_ignored_hangup(signal: i32) -> bool {
    let ignored = || {
        let status = std::fs::read_to_string("/proc/self/status").ok()?;
        let mask = status.lines().find_map(|line| line.strip_prefix("SigIgn:"))?;
        u64::from_str_radix(mask.trim(), 16).ok()
    };
    signal == SIGHUP && ignored().is_some_and(|mask| mask & (1 << (SIGHUP - 1)) != 0)
}

#[cfg(test)]
mod tests {
    use std::os::unix::process::ExitStatusExt;
    use std::process::Command;

    use nix::errno::Errno;
    use nix::sys::signal::{SigHandler, Signal, raise, signal};

    use super::*;
    use crate::args::{Outcome, Program, allowed_cpus, parse};

    /// Creates lcores 0 to 2: the last one on all CPUs, the others on the first CPU.
    fn lcores() -> Lcores {
        let cpus = allowed_cpus().unwrap();
        let list = format!("0@{first},1@{first},2@({all})", first = cpus[0], all = ranges(&cpus));
        let argv = ["x", "-l", &list, "--main-lcore", "1"].map(Into::into);
        match parse(argv, &Program::default()).unwrap() {
            Outcome::Run(parsed) => Lcores::new(&parsed.eal).unwrap(),
            Outcome::Print(text) => panic!("{text}"),
        }
    }

    fn my_cpus() -> Vec<usize> {
        affinity::get().unwrap()
    }

    #[test]
    fn workers_are_pinned_and_named() {
        let lcores = lcores();
        assert_eq!(lcores.main_id(), 1);
        assert_eq!(lcores.worker_ids().collect::<Vec<_>>(), [0, 2]);
        assert_eq!(lcores.ids().len(), 3);
        for id in lcores.worker_ids() {
            let handle = lcores
                .launch(id, |context| {
                    let name = std::thread::current().name().map(str::to_owned);
                    (context.cpus == my_cpus(), context.main, name)
                })
                .unwrap();
            assert_eq!(handle.id(), id);
            assert_eq!(handle.join(), Ok((true, false, Some(format!("vireo-worker{id}")))));
        }
    }

    #[test]
    fn the_main_lcore_is_the_calling_thread() {
        std::thread::spawn(|| {
            let caller = std::thread::current().id();
            let lcores = lcores();
            let same = lcores.run_main(|context| {
                assert_eq!((context.id, context.main), (1, true));
                assert_eq!(my_cpus(), context.cpus);
                std::thread::current().id()
            });
            assert_eq!(same, Ok(caller));
        })
        .join()
        .unwrap();
    }

    #[test]
    fn a_worker_can_borrow() {
        let lcores = lcores();
        let stop = StopFlag::new();
        let words = ["a".to_owned()];
        std::thread::scope(|scope| {
            let handle = lcores
                .launch_in(scope, 0, |_| {
                    while !stop.is_set() {
                        std::thread::yield_now();
                    }
                    words[0].as_str()
                })
                .unwrap();
            assert!(!handle.is_finished());
            let error = lcores.launch_in(scope, 0, |_| ()).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Busy);
            stop.set();
            assert_eq!(handle.join(), Ok("a"));
        });
        assert_eq!(stop.signal(), None);
    }

    #[test]
    fn a_panic_is_an_error_and_frees_the_lcore() {
        let lcores = lcores();
        let handle = lcores.launch(2, |_| panic!("index {}", 7)).unwrap();
        assert_eq!(handle.join().unwrap_err().to_string(), "lcore 2: its thread panicked: index 7");
        assert_eq!(lcores.launch(2, |context| context.id).unwrap().join(), Ok(2));
    }

    #[test]
    fn what_is_no_worker() {
        let error = lcores().launch(1, |_| ()).unwrap_err();
        assert_eq!(error.to_string(), "cannot launch on lcore 1: not one of the workers (0,2)");
    }

    #[test]
    fn a_cpu_that_is_not_there_fails_at_launch() {
        let spec = |id, cpus| LcoreSpec { id, cpus };
        for cpus in [vec![1023], vec![1022, 1023], vec![1024], vec![4095]] {
            let workers = vec![Worker { spec: spec(1, cpus), busy: Busy::default() }];
            let lcores = Lcores { main: spec(0, vec![0]), workers, nodes: BTreeMap::new() };
            let error = lcores.launch(1, |_| ()).unwrap_err();
            assert_eq!(error.errno(), Some(Errno::EINVAL), "{error}");
        }
    }

    /// Runs in its own process, because handlers are never removed. `a_second_signal_ends_the_process` starts
    /// it.
    #[test]
    #[ignore = "run by a_second_signal_ends_the_process"]
    fn child_that_signals_itself() {
        // A run of the tests under nohup(1) ignores it, and programs inherit that.
        // SAFETY: no handler is replaced.
        unsafe { signal(Signal::SIGHUP, SigHandler::SigDfl) }.unwrap();
        let flag = StopFlag::on_signals().unwrap();
        assert!(!flag.is_set());
        flag.set();
        assert_eq!((flag.is_set(), flag.signal()), (true, None));
        raise(Signal::SIGTERM).unwrap();
        assert_eq!((flag.is_set(), flag.signal()), (true, Some(SIGTERM)));
        flag.set();
        assert_eq!(flag.signal(), Some(SIGTERM));
        // timeout(1) sends two signals like this, one right after the other. They are one request.
        raise(Signal::SIGINT).unwrap();
        raise(Signal::SIGHUP).unwrap();
        assert_eq!(flag.signal(), Some(SIGHUP));
        std::thread::sleep(StopFlag::SIGNAL_GRACE * 2);
        raise(Signal::SIGINT).unwrap();
    }

    /// Runs in its own process, like the test above.
    #[test]
    #[ignore = "run by a_hangup_that_was_ignored_stays_ignored"]
    fn child_that_hangs_up() {
        let flag = StopFlag::on_signals().unwrap();
        raise(Signal::SIGHUP).unwrap();
        assert!(!flag.is_set());
    }

    #[test]
    fn a_hangup_that_was_ignored_stays_ignored() {
        let child = std::env::current_exe().unwrap();
        let status = Command::new("sh")
            .args(["-c", "trap '' HUP; exec \"$@\"", "sh"])
            .arg(child)
            .args(["--exact", "lcore::tests::child_that_hangs_up", "--ignored", "--quiet"])
            .output()
            .unwrap()
            .status;
        assert!(status.success(), "{status}");
    }

    #[test]
    fn a_second_signal_ends_the_process() {
        let status = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "lcore::tests::child_that_signals_itself", "--ignored", "--quiet"])
            .output()
            .unwrap()
            .status;
        assert_eq!((status.code(), status.signal()), (Some(StopFlag::EXIT_CODE), None));
    }
}
