//! The EAL of a process: what its arguments ask for, made.

use std::path::{Path, PathBuf};

use crate::args::{EalArgs, IovaMode, ranges};
use crate::error::{Error, ErrorKind, Result};
use crate::lcore::Lcores;
use crate::mem::{Backing, Placement, Region, hugepages};
use crate::runtime::RuntimeDir;
use crate::sandbox::Sandbox;
use crate::user::{User, UserName};
use crate::vfio::{DeviceNodes, Vfio, VfioMode};

/// What every program starts with. Opens no device and takes no memory yet.
#[derive(Debug)]
pub struct Eal {
    /// The arguments.
    pub args: EalArgs,
    /// The lcores.
    pub lcores: Lcores,
    /// The devices' kernel side.
    pub vfio: Vfio,
    runtime: Option<RuntimeDir>,
    /// Whom to become, if anybody.
    user: Option<User>,
}

impl Eal {
    /// Starts the log (unless the program has one), takes the runtime directory and finds the lcores.
    ///
    /// # Errors
    /// `Busy` when another process runs under the same `--file-prefix`; `Usage` when there is no such `--user`,
    /// or nothing where `--vfio-fds` says.
    pub fn init(args: EalArgs) -> Result<Self> {
        crate::log::init(&args.log_levels, args.log_color);
        args.warnings.iter().for_each(|warning| tracing::warn!("{warning}"));
        args.notes.iter().for_each(|note| tracing::info!("{note}"));
        let nodes = args.vfio_fds.as_ref().map_or(Ok(DeviceNodes::default()), DeviceNodes::of)?;
        let eal = Self {
            lcores: Lcores::new(&args)?,
            vfio: Vfio::with_nodes(args.vf_token, nodes).isolate(args.isolate_ports),
            user: args.user.as_ref().map(UserName::find).transpose()?,
            runtime: RuntimeDir::new(&args)?,
            args,
        };
        tracing::debug!("{}", eal.summary());
        Ok(eal)
    }

    /// One line on what [`init`](Self::init) made.
    fn summary(&self) -> String {
        let ids: Vec<usize> = self.lcores.ids().into_iter().map(|id| id as usize).collect();
        let runtime = self.runtime.as_ref().map_or("none".into(), |dir| dir.path().display().to_string());
        format!(
            "initialized: lcores {}, main lcore {}, runtime directory {runtime}",
            ranges(&ids),
            self.lcores.main_id()
        )
    }

    /// Gives up what set-up needed and packets do not: root (`--user`), then, unless `--no-sandbox`, files and
    /// system calls. Call it when ports run, and before lcores do: before Linux 7.0 Landlock holds only for the
    /// calling thread and those that it starts. In the directories `sockets`, unix sockets can still be made and
    /// removed, and connected to anywhere.
    ///
    /// # Errors
    /// `Permission` when the process cannot become the user, `Os` when the kernel refuses the sandbox.
    pub fn confine(&self, sockets: &[PathBuf]) -> Result<()> {
        let runtime = self.runtime.as_ref().map(RuntimeDir::path);
        let removable: Vec<&Path> = runtime.into_iter().chain(runtime.and_then(Path::parent)).collect();
        // Root opens them, for the user may not be able to.
        let sandbox = if self.args.no_sandbox { None } else { Some(Sandbox::new(&removable, sockets)?) };
        self.user.map_or(Ok(()), User::drop_privileges)?;
        sandbox.map_or(Ok(()), Sandbox::close)
    }

    /// Where packet memory comes from.
    pub fn backing(&self) -> Backing {
        let memory = &self.args.memory;
        match &memory.huge_dir {
            _ if memory.no_huge => Backing::SmallPages,
            // The pages of a killed process must not go before its NICs are closed (`vfio::group`): anonymous
            // ones do, with the address space, while files are closed after it.
            _ if memory.in_memory && self.args.uses(VfioMode::Noiommu) => Backing::HugeMemfd,
            _ if memory.in_memory => Backing::HugeAnonymous,
            Some(dir) => Backing::HugeFile { dir: dir.clone() },
            None => Backing::HugeMemfd,
        }
    }

    /// Reserves packet memory: a region for each of `parts`, of so many bytes and on that NUMA node, as
    /// [`Region::adjoining`] does. With `-m` the last one gets what the others leave of so many megabytes. Where
    /// `--numa-mem` is given, pages come from their node or not at all.
    ///
    /// # Errors
    /// `Usage` when `-m` is less than `parts` take, `Os` when the pages are not there.
    pub fn reserve(&self, parts: &[(Option<u32>, usize)]) -> Result<Vec<Region>> {
        let (memory, backing) = (&self.args.memory, self.backing());
        let mut parts = parts.to_vec();
        if parts.len() > 1 {
            // Each region has whole pages.
            let page = backing.page_size()?;
            parts.iter_mut().for_each(|(_, len)| *len = len.next_multiple_of(page));
        }
        let need: usize = parts.iter().map(|(_, len)| len).sum();
        let by_node = !memory.socket_mem.is_empty() && parts.iter().any(|(node, _)| node.is_some());
        let asked = memory.megabytes.filter(|_| !by_node).map(|megabytes| megabytes as usize * (1 << 20));
        if asked.is_some_and(|asked| asked < need) {
            return Err(Error::new(
                ErrorKind::Usage,
                format!("cannot work with -m {}", self.args.memory.megabytes.unwrap_or(0)),
                format!("ports and packet buffers need {} MiB", need.div_ceil(1 << 20)),
            )
            .with_hint(format!("give -m {} or leave it out", need.div_ceil(1 << 20))));
        }
        if let (Some(asked), Some((_, last))) = (asked, parts.last_mut()) {
            *last += asked - need;
        }
        let placement = if by_node { Placement::Required } else { Placement::Preferred };
        Region::adjoining(&parts, backing, placement)
    }

    /// One line on the IOVA mode, given whether the ports use physical addresses.
    ///
    /// # Errors
    /// `Usage` when `--iova-mode` asks for what the ports cannot do.
    pub fn iova_mode(&self, physical: bool) -> Result<IovaMode> {
        match (self.args.iova_mode, physical) {
            (None | Some(IovaMode::Pa), true) => Ok(IovaMode::Pa),
            (None | Some(IovaMode::Va), false) => Ok(IovaMode::Va),
            (Some(asked), _) => Err(Error::new(
                ErrorKind::Usage,
                format!("cannot use --iova-mode {asked:?}").to_lowercase(),
                if physical {
                    "without an IOMMU NICs use physical addresses"
                } else {
                    "NICs behind an IOMMU use IOVAs"
                },
            )
            .with_hint("leave --iova-mode out")),
        }
    }

    /// One line on the machine's hugepages, for the start-up report.
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
