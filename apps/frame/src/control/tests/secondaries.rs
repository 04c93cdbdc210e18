//! A primary and secondary processes that these tests play: what the primary does about each of their reports, also about
//! those that no correct process sends.

use std::io::Write as _;
use std::os::fd::AsFd as _;
use std::os::unix::net::UnixStream;
use std::time::Duration;

use vireo_eal::Eal;
use vireo_eal::handover::{Channel, Fds, encode};
use vireo_eal::lcore::StopFlag;

use super::setup::{Counted, Device, PATIENCE, Setup, Stop, await_inspection, eal, frame, passes, until};
use crate::control::SecondaryState;
use crate::control::lend::{Direction, LentQueues, Order, QueueCounts, Report};

/// A played secondary process. It polls none of the queues that it is lent.
struct Secondary {
    eal: Eal,
}

impl Secondary {
    /// Asks the primary for its offer.
    fn of(prefix: &str) -> Self {
        Self { eal: eal(&["--file-prefix", prefix, "--proc-type", "secondary"]) }
    }

    /// Starts process 1 of two, and waits for its queues.
    fn with_queues_of(prefix: &str) -> (Self, LentQueues) {
        let secondary = Self::of(prefix);
        secondary.report(&Report::Ready { process: 1, count: 2 });
        let lent = secondary.lent();
        (secondary, lent)
    }

    fn channel(&self) -> &Channel {
        self.eal.primary().unwrap().channel()
    }

    fn report(&self, report: &Report) {
        self.channel().send(report, &Fds::default()).unwrap();
    }

    /// Next order, after those to count; `None` when the primary has closed the connection.
    fn order(&self) -> Option<Order> {
        loop {
            match self.channel().receive(PATIENCE) {
                Ok((Order::Count, _)) => self.report(&Report::Counted(QueueCounts::new())),
                Ok((order, _)) => return Some(order),
                Err(error) => {
                    assert!(self.channel().has_message(Duration::ZERO).unwrap(), "{error}");
                    return None;
                }
            }
        }
    }

    fn lent(&self) -> LentQueues {
        match self.order() {
            Some(Order::Poll(lent)) => lent,
            other => panic!("{other:?} instead of queues"),
        }
    }

    fn expect_refusal(self, part: &str) {
        match self.order() {
            Some(Order::Refuse(why)) => assert!(why.contains(part), "{why}"),
            other => panic!("{other:?} instead of a refusal"),
        }
        assert!(self.order().is_none());
    }

    fn leaves(self, lent: LentQueues) {
        self.report(&Report::Left(lent));
        assert!(self.order().is_none());
    }
}

/// Runs a primary with each driver, and calls `act` with its devices and its `--file-prefix`. Process 1 polls port 0, which
/// forwards to itself; the primary does that while there is no process 1, and always forwards between ports 2 and 3.
fn with_primary(name: &str, act: impl Fn(&[Device], &str) + Sync) -> [Counted; 2] {
    [true, false].map(|virtio| {
        let prefix = format!("vireo-test-{}-{name}", std::process::id());
        let ways = &[(1, 0, 0), (0, 2, 3), (0, 3, 2)];
        let setup = Setup { ways, prefix: Some(&prefix), ..Setup::new(virtio) };
        setup.run(|devices| act(devices, &prefix))
    })
}

#[test]
fn only_the_process_that_was_lent_queues_has_them() {
    let all = with_primary("lend", |devices, prefix| {
        let (secondary, lent) = Secondary::with_queues_of(prefix);
        devices[0].transmitted();
        assert!(devices[0].receive(&frame(7)));
        for round in 0..3 {
            await_inspection(&devices[2]);
            passes(&devices[2], &devices[3], 1 << 30 | round << 16, "others");
        }
        assert!(devices[0].transmitted().is_empty(), "the primary polls the queues, too");
        secondary.leaves(lent);
        until(|| !devices[0].transmitted().is_empty(), "the primary does not poll the queues");
    });
    for counted in all {
        assert_eq!(counted.secondaries, [SecondaryState::Polls, SecondaryState::Left]);
        assert_eq!(counted.restarts, 0);
    }
}

#[test]
fn a_process_that_does_not_belong_to_the_primary_is_refused() {
    with_primary("refuse", |_, prefix| {
        for (process, count, why) in [(1, 3, "--num-procs 2"), (0, 2, "process 0 (--proc-id) is the primary")]
        {
            let secondary = Secondary::of(prefix);
            secondary.report(&Report::Ready { process, count });
            secondary.expect_refusal(why);
        }
        let (secondary, lent) = Secondary::with_queues_of(prefix);
        let rival = Secondary::of(prefix);
        rival.report(&Report::Ready { process: 1, count: 2 });
        rival.expect_refusal("polls the queues of process 1 already");
        secondary.leaves(lent);
        let (next, lent) = Secondary::with_queues_of(prefix);
        next.leaves(lent);
    });
}

#[test]
fn what_a_process_without_queues_reports_changes_nothing() {
    let all = with_primary("early", |devices, prefix| {
        let early = [
            || Report::Returned(LentQueues::default()),
            || Report::Fault("it has no device".to_owned()),
            || Report::Left(LentQueues::default()),
        ];
        for report in early {
            let secondary = Secondary::of(prefix);
            let number = (Direction::Tx, 0);
            secondary.report(&Report::Counted([(number, Default::default())].into()));
            secondary.report(&report());
            assert!(secondary.order().is_none(), "{:?}", report());
            passes(&devices[0], &devices[0], 1 << 30, "after a report");
        }
    });
    for counted in all {
        assert_eq!((counted.restarts, &*counted.secondaries), (0, &[][..]));
    }
}

#[test]
fn a_process_that_reports_all_the_time_delays_nobody() {
    with_primary("flood", |devices, prefix| {
        let (secondary, lent) = Secondary::with_queues_of(prefix);
        let is_enough = StopFlag::new();
        let report = encode(&Report::Counted(QueueCounts::new())).unwrap();
        let many = [&(report.len() as u32).to_ne_bytes()[..], &report].concat().repeat(1000);
        let mut socket = UnixStream::from(secondary.channel().as_fd().try_clone_to_owned().unwrap());
        std::thread::scope(|scope| {
            scope.spawn(|| {
                while !is_enough.is_set() {
                    socket.write_all(&many).unwrap();
                }
            });
            let _enough = Stop(&is_enough);
            for _ in 0..5 {
                await_inspection(&devices[2]);
            }
        });
        secondary.leaves(lent);
    });
}

#[test]
fn a_port_restarts_when_its_queues_have_been_returned() {
    let all = with_primary("restart", |devices, prefix| {
        let (secondary, lent) = Secondary::with_queues_of(prefix);
        let resets = devices[0].resets();
        devices[0].vanish(true);
        assert!(matches!(secondary.order(), Some(Order::Return)));
        devices[0].vanish(false);
        // Longer than the primary waits for the queues before it serves others.
        for round in 0..20 {
            await_inspection(&devices[2]);
            passes(&devices[2], &devices[3], 1 << 30 | round << 16, "others");
        }
        assert_eq!(devices[0].resets(), resets, "the device was reset under the process");
        secondary.report(&Report::Returned(lent));
        let lent = secondary.lent();
        assert_ne!(devices[0].resets(), resets);
        secondary.leaves(lent);
    });
    for counted in all {
        assert_eq!(counted.secondaries, [SecondaryState::Polls, SecondaryState::Polls, SecondaryState::Left]);
        assert_eq!(counted.restarts, 1);
    }
}

#[test]
fn queues_that_come_back_wrong_or_not_at_all_are_reset() {
    let all = with_primary("fault", |_, prefix| {
        let (secondary, _) = Secondary::with_queues_of(prefix);
        secondary.report(&Report::Returned(LentQueues::default()));
        secondary.lent();
        secondary.report(&Report::Fault("its device lies".to_owned()));
        let lent = secondary.lent();
        secondary.leaves(lent);
    });
    for counted in all {
        assert_eq!(counted.restarts, 2);
    }
}

#[test]
fn a_primary_that_ends_takes_all_queues_back() {
    let all = with_primary("end", |_, prefix| {
        let (secondary, lent) = Secondary::with_queues_of(prefix);
        std::thread::spawn(move || {
            if let Some(Order::End) = secondary.order() {
                secondary.leaves(lent);
            }
        });
    });
    for counted in all {
        assert_eq!(counted.secondaries, [SecondaryState::Polls, SecondaryState::Left]);
    }
}
