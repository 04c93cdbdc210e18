//! The EAL of a process, initialized from its arguments.

use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};

use crate::args::{EalArgs, IovaMode, ProcType, ranges};
use crate::dma::BUFFER_SIZE;
use crate::error::{Error, ErrorKind, Result};
use crate::handover::{EalRecord, Fds, Listener, Offer, Role, RunningProgram, region_files};
use crate::lcore::Lcores;
use crate::mem::{Backing, Placement, Region, hugepages};
use crate::runtime::RuntimeDir;
use crate::sandbox::Sandbox;
use crate::telemetry::TelemetrySocket;
use crate::user::{User, UserName};
use crate::vfio::{DeviceNodes, Vfio, VfioMode};

/// Environment that every program initializes first. Initialization opens no device and reserves no memory.
#[derive(Debug)]
pub struct Eal {
    /// EAL arguments.
    pub args: EalArgs,
    /// Lcores of the program.
    pub lcores: Lcores,
    /// VFIO state, which acquires devices.
    pub vfio: Vfio,
    runtime: Option<RuntimeDir>,
    telemetry: OnceLock<Arc<TelemetrySocket>>,
    /// Where this program waits for its successor and for secondary processes.
    listener: OnceLock<Listener>,
    /// The program whose ports this process takes over or shares, if it does.
    running: Option<RunningProgram>,
    /// User to drop privileges to, if any.
    user: Option<User>,
}

impl Eal {
    /// Starts the log (unless the program has its own), locks the runtime directory and determines the
    /// lcores.
    ///
    /// # Errors
    /// `Busy` if another process uses the same `--file-prefix`; `Usage` if the user of `--user` does not
    /// exist; and why the descriptors of `--vfio-fds` are unavailable: `Usage` for `listen`, `Unavailable`
    /// for a socket without a listener. With `--takeover` or `--proc-type secondary`, `Unavailable` if no program runs,
    /// and `Busy` with its reason if it refuses this process.
    pub fn init(args: EalArgs) -> Result<Self> {
        crate::log::init(&args.log_levels, args.log_color);
        args.warnings.iter().for_each(|warning| tracing::warn!("{warning}"));
        args.notes.iter().for_each(|note| tracing::info!("{note}"));
        let (runtime, running) = Self::find_runtime(&args)?;
        // The running program passes its devices, open.
        let nodes = args.vfio_fds.as_ref().filter(|_| running.is_none());
        let nodes = nodes.map_or(Ok(DeviceNodes::default()), DeviceNodes::of)?;
        let eal = Self {
            lcores: Lcores::new(&args)?,
            vfio: Vfio::with_nodes(args.vf_token, nodes).isolate(args.isolate_ports),
            user: args.user.as_ref().map(UserName::find).transpose()?,
            runtime,
            telemetry: OnceLock::new(),
            listener: OnceLock::new(),
            running,
            args,
        };
        tracing::debug!("{}", eal.summary());
        Ok(eal)
    }

    /// Locks the runtime directory, or finds the program that has it, as the arguments ask.
    fn find_runtime(args: &EalArgs) -> Result<(Option<RuntimeDir>, Option<RunningProgram>)> {
        let path = RuntimeDir::path_for(args);
        let role = match args.proc_type {
            _ if args.takeover => Some(Role::Successor),
            ProcType::Secondary => Some(Role::Secondary),
            ProcType::Primary | ProcType::Auto => None,
        };
        let running = match (role, &args.peer_of) {
            (Some(role), Some(program)) => RunningProgram::find(&path, program, role)?,
            (_, program) => match (RuntimeDir::new(args), program) {
                (Err(error), Some(program))
                    if error.kind() == ErrorKind::Busy && args.proc_type == ProcType::Auto =>
                {
                    RunningProgram::find(&path, program, Role::Secondary)?
                }
                (runtime, _) => return Ok((runtime?, None)),
            },
        };
        let runtime = RuntimeDir::of_running(path, running.lock()?.into());
        Ok((Some(runtime), Some(running)))
    }

    /// Describes on one line what [`init`](Self::init) set up.
    fn summary(&self) -> String {
        let ids: Vec<usize> = self.lcores.ids().into_iter().map(|id| id as usize).collect();
        let runtime = self.runtime.as_ref().map_or("none".into(), |dir| dir.path().display().to_string());
        format!(
            "initialized: lcores {}, main lcore {}, runtime directory {runtime}",
            ranges(&ids),
            self.lcores.main_id()
        )
    }

    /// Creates the telemetry socket, for a program that will serve it. If it cannot be created, that is
    /// logged, because a program runs without it too. Call it before [`confine`](Self::confine).
    pub fn open_telemetry(&self) {
        let socket = match &self.running {
            None => TelemetrySocket::new(&self.args),
            // The primary answers for all processes.
            Some(running) if running.role() == Role::Secondary => Ok(None),
            Some(running) => running.telemetry(),
        };
        match socket {
            Ok(socket) => drop(socket.map(|socket| self.telemetry.set(socket.into()))),
            Err(error) => tracing::warn!("{error}"),
        }
    }

    /// Telemetry socket, if there is one.
    pub fn telemetry(&self) -> Option<&Arc<TelemetrySocket>> {
        self.telemetry.get()
    }

    /// Lets other processes take over or share the ports of this program, if it can do that (`Program::peer_of`), has a
    /// runtime directory and is not a secondary process itself. If the socket for that cannot be created, that is logged.
    /// Call it before [`confine`](Self::confine).
    pub fn open_handover(&self) {
        let (Some(program), Some(runtime)) = (&self.args.peer_of, &self.runtime) else { return };
        let listener = match &self.running {
            None => Listener::in_dir(runtime.path(), program),
            Some(running) if running.role() == Role::Secondary => return,
            Some(running) => running.listener(program),
        };
        match listener {
            Ok(listener) => drop(self.listener.set(listener)),
            Err(error) => tracing::warn!("{error}"),
        }
    }

    /// Where this program waits for its successor and for secondary processes, if it does.
    pub fn peers(&self) -> Option<&Listener> {
        self.listener.get()
    }

    /// The program whose ports this process takes over or shares, if it does.
    pub fn running(&self) -> Option<&RunningProgram> {
        self.running.as_ref()
    }

    /// The primary, if this is a secondary process.
    pub fn primary(&self) -> Option<&RunningProgram> {
        self.running().filter(|running| running.role() == Role::Secondary)
    }

    /// Creates the offer for another process: sockets, the lock of the runtime directory, the files of `regions`, and
    /// `program`, the record of the layers above.
    ///
    /// # Errors
    /// `Unavailable` if memory is anonymous or there is no runtime directory.
    pub fn offer<'a>(
        &'a self,
        regions: impl IntoIterator<Item = &'a Region>,
        program: Vec<u8>,
        fds: &mut Fds<'a>,
    ) -> Result<Offer> {
        let (Some(runtime), Some(listener)) = (&self.runtime, self.listener.get()) else {
            let why = "it has no runtime directory (--in-memory)";
            return Err(Error::new(ErrorKind::Unavailable, "cannot hand over to another process", why));
        };
        let telemetry = self.telemetry();
        let eal = EalRecord {
            pid: std::process::id(),
            process: listener.process().map(|process| fds.add(process)),
            lock: fds.add(runtime.lock()),
            listener: fds.add(listener.as_fd()),
            telemetry: telemetry.map(|socket| (fds.add(socket.as_fd()), socket.path().to_owned())),
            regions: region_files(regions, fds)?,
            buffer_size: BUFFER_SIZE as u32,
        };
        Ok(Offer { eal, program })
    }

    /// Leaves the runtime directory, the sockets and the mappings of memory to the successor, which runs now.
    pub fn leave(&self) {
        self.vfio.lend(true);
        self.runtime.iter().for_each(RuntimeDir::leave);
        self.telemetry().into_iter().for_each(|socket| socket.leave());
    }

    /// Takes the runtime directory, the sockets and the mappings of memory from the predecessor.
    pub fn succeed(&self) {
        self.vfio.lend(false);
        self.runtime.iter().for_each(RuntimeDir::take);
        self.telemetry().into_iter().for_each(|socket| socket.take());
    }

    /// Drops what only set-up needs: root privileges (`--user`), then, unless `--no-sandbox` is given, access
    /// to files and system calls. Call it after starting the ports and before launching the lcores: before
    /// Linux 7.0, Landlock applies only to the calling thread and to threads that it starts later. If
    /// `sockets` names directories, unix sockets can still be created and removed in them, and connected to
    /// anywhere.
    ///
    /// # Errors
    /// `Permission` if the process cannot become the user, `Os` if the kernel refuses the sandbox.
    pub fn confine(&self, sockets: &[PathBuf]) -> Result<()> {
        let runtime = self.runtime.as_ref().map(RuntimeDir::path);
        let telemetry = self.telemetry().and_then(|socket| socket.path().parent());
        let own = [runtime, telemetry].into_iter().flatten();
        let removable: Vec<&Path> = own.flat_map(|dir| [Some(dir), dir.parent()]).flatten().collect();
        // The sandbox opens these directories while the process is still root: the user may not be able to.
        let sandbox = if self.args.no_sandbox { None } else { Some(Sandbox::new(&removable, sockets)?) };
        self.user.map_or(Ok(()), User::drop_privileges)?;
        sandbox.map_or(Ok(()), Sandbox::close)
    }

    /// Returns where packet memory comes from.
    pub fn backing(&self) -> Backing {
        let memory = &self.args.memory;
        match &memory.huge_dir {
            _ if memory.no_huge => Backing::SmallPages,
            // Without an IOMMU, the pages of a killed process must not be freed before its NICs are closed
            // (`vfio::group`). The kernel frees anonymous pages with the address space, before it closes
            // files.
            _ if memory.in_memory && self.args.uses(VfioMode::Noiommu) => Backing::HugeMemfd,
            _ if memory.in_memory => Backing::HugeAnonymous,
            Some(dir) => Backing::HugeFile { dir: dir.clone() },
            None => Backing::HugeMemfd,
        }
    }

    /// Reserves packet memory: one region for each of `parts`, which are a NUMA node and a length in bytes,
    /// as [`Region::adjoining`] does. With `-m`, the last region also gets what the others leave of the
    /// requested megabytes. With `--numa-mem`, pages must come from their node, or the call fails. If this process
    /// takes over or shares the ports of a running program, the first call returns the regions of that.
    ///
    /// # Errors
    /// `Usage` if `-m` is less than `parts` need, `Os` if the pages are not available, `Busy` if the running program has
    /// other memory.
    pub fn reserve(&self, parts: &[(Option<u32>, usize)]) -> Result<Vec<Region>> {
        let (memory, backing) = (&self.args.memory, self.backing());
        let mut parts = parts.to_vec();
        if parts.len() > 1 {
            // Each region consists of whole pages.
            let page = backing.page_size()?;
            parts.iter_mut().for_each(|(_, len)| *len = len.next_multiple_of(page));
        }
        let need: usize = parts.iter().map(|(_, len)| len).sum();
        let by_node = !memory.socket_mem.is_empty() && parts.iter().any(|(node, _)| node.is_some());
        let asked = memory.megabytes.filter(|_| !by_node).map(|megabytes| megabytes as usize * (1 << 20));
        if asked.is_some_and(|asked| asked < need) {
            return Err(Error::new(
                ErrorKind::Usage,
                format!("cannot use -m {}", self.args.memory.megabytes.unwrap_or(0)),
                format!("ports and packet buffers need {} MiB", need.div_ceil(1 << 20)),
            )
            .with_hint(format!("use -m {} or leave it out", need.div_ceil(1 << 20))));
        }
        if let (Some(asked), Some((_, last))) = (asked, parts.last_mut()) {
            *last += asked - need;
        }
        if let Some(files) = self.running.as_ref().and_then(RunningProgram::take_regions) {
            return Region::adopt(files, &parts, &backing);
        }
        let placement = if by_node { Placement::Required } else { Placement::Preferred };
        Region::adjoining(&parts, backing, placement)
    }

    /// Determines the IOVA mode. `physical` is whether the ports use physical addresses.
    ///
    /// # Errors
    /// `Usage` if `--iova-mode` requests a mode that the ports do not support.
    pub fn iova_mode(&self, physical: bool) -> Result<IovaMode> {
        match (self.args.iova_mode, physical) {
            (None | Some(IovaMode::Pa), true) => Ok(IovaMode::Pa),
            (None | Some(IovaMode::Va), false) => Ok(IovaMode::Va),
            (Some(asked), _) => Err(Error::new(
                ErrorKind::Usage,
                format!("cannot use --iova-mode {asked:?}").to_lowercase(),
                if physical {
                    "without an IOMMU, NICs use physical addresses"
                } else {
                    "NICs behind an IOMMU use IOVAs"
                },
            )
            .with_hint("leave --iova-mode out")),
        }
    }

    /// Describes the machine's hugepages on one line, for the start-up report.
    pub fn hugepages_line() -> String {
        let sizes: Vec<String> = hugepages(Path::new("/sys"))
            .iter()
            .filter(|pages| pages.total > 0 || pages.surplus > 0)
            .map(|pages| {
                let more =
                    if pages.surplus > 0 { format!(" and {} surplus", pages.surplus) } else { String::new() };
                format!("{} of {} free{more} of {} KiB", pages.free, pages.total, pages.page_size >> 10)
            })
            .collect();
        if sizes.is_empty() { "none".into() } else { sizes.join(", ") }
    }
}
