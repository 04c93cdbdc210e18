//! Wakes the lcore of an RX queue that sleeps.

use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;

use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};
use vireo_eal::dma::PeerEvent;
use vireo_eal::event::Event;
use vireo_eal::{Error, Result};

/// Can be read when the frontend has kicked, or the ring has changed, since the last [`Waker::take`].
///
/// Both are edges (`EPOLLET`): a frontend shares the kick, so a read of it might find that another one was faster, and
/// wait.
#[derive(Debug)]
pub(super) struct Waker {
    epoll: Epoll,
    /// Signaled when the ring is started, replaced or stopped.
    changed: Event,
    /// The kick of the current ring.
    kick: Option<Arc<PeerEvent>>,
}

impl Waker {
    /// # Errors
    /// `Os` if the process or the machine has too many open files.
    pub(super) fn new() -> Result<Self> {
        let changed = Event::new()?;
        let failed = |errno| Error::os("cannot let an RX queue sleep", errno);
        let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC).map_err(failed)?;
        epoll.add(&changed, edges()).map_err(failed)?;
        Ok(Self { epoll, changed, kick: None })
    }

    /// See [`Waker::changed`].
    pub(super) fn changed(&self) -> &Event {
        &self.changed
    }

    /// Listens to this kick and no other, and forgets what was signaled before. Returns false if there is none, or the
    /// kernel lacks memory. The ring does not change meanwhile.
    pub(super) fn listen_to(&mut self, kick: Option<&Arc<PeerEvent>>) -> bool {
        let Some(kick) = kick else { return false };
        if self.kick.as_ref().is_some_and(|known| Arc::ptr_eq(known, kick)) {
            return true;
        }
        // The frontend's own descriptor would keep it in the set.
        if let Some(old) = self.kick.take() {
            let _ = self.epoll.delete(&*old);
        }
        let added = self.epoll.add(&**kick, edges()).is_ok();
        self.kick = added.then(|| Arc::clone(kick));
        // An eventfd that was signaled at any time is an edge when it is added.
        self.take();
        added
    }

    /// Takes what has been signaled so far.
    pub(super) fn take(&self) {
        self.changed.take();
        let _ = self.epoll.wait(&mut [EpollEvent::empty(); 2], EpollTimeout::ZERO);
    }
}

impl AsFd for Waker {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.epoll.0.as_fd()
    }
}

fn edges() -> EpollEvent {
    EpollEvent::new(EpollFlags::EPOLLIN | EpollFlags::EPOLLET, 0)
}
