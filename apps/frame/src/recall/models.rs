//! Interleavings of lcores, the control thread and a stop. Under loom a wait has no timeout, so a lost
//! wake-up is a deadlock.

use std::sync::Arc;

use vireo_eal::sync::{model, skip_branch, thread};

use super::*;

type Lanes = Vec<Lane<(), (), ()>>;

fn lane(from: usize, to: usize) -> Lane<(), (), ()> {
    Lane { rx: (), from, tx: (), to, hook: () }
}

/// Returns the two ends of each lane, sorted.
fn ends(lanes: &[Lane<(), (), ()>]) -> Vec<(usize, usize)> {
    let mut ends: Vec<_> = lanes.iter().map(|lane| (lane.from, lane.to)).collect();
    ends.sort_unstable();
    ends
}

/// Polling rounds of an lcore that are run in every order. Without a limit, two lcores could poll in turn
/// forever.
const ROUNDS: usize = 4;

/// Runs an lcore without packets, like `run_lanes` of `launch`.
fn run(recall: &Recall<(), (), ()>, lcore: u32, mut lanes: Lanes) -> Lanes {
    for round in 0.. {
        if round == ROUNDS {
            skip_branch();
        }
        thread::yield_now();
        if !recall.stop.is_raised() {
            continue;
        }
        if recall.stop.is_set() {
            return lanes;
        }
        recall.visit(lcore, &mut lanes);
    }
    lanes
}

fn start(recall: &Arc<Recall<(), (), ()>>, lcore: u32, lanes: Lanes) -> thread::JoinHandle<Lanes> {
    let recall = Arc::clone(recall);
    thread::spawn(move || run(&recall, lcore, lanes))
}

/// Requests a stop, and then simulates the timeout of the control thread's wait.
fn stop(recall: &Recall<(), (), ()>) {
    recall.stop.set();
    drop(recall.state());
    recall.all_visited.notify_all();
}

#[test]
fn lanes_leave_and_come_back() {
    model(Some(2), || {
        let recall = Arc::new(Recall::new(&StopFlag::new()));
        let lcores = [
            start(&recall, 0, vec![lane(0, 1), lane(2, 3)]),
            start(&recall, 1, vec![lane(1, 0), lane(3, 2)]),
        ];
        let mut taken = recall.take(Wanted::At(0..1), &[0, 1]);
        taken.sort_by_key(|(lcore, _)| *lcore);
        let from = |(lcore, lane): &(u32, Lane<(), (), ()>)| (*lcore, lane.from, lane.to);
        assert_eq!(taken.iter().map(from).collect::<Vec<_>>(), [(0, 0, 1), (1, 1, 0)]);
        recall.give(taken, &[0, 1]);
        assert!(!recall.stop.is_raised(), "lcores are still called");
        recall.stop.set();
        let lanes = lcores.map(|lcore| ends(&lcore.join().unwrap()));
        assert_eq!(lanes, [[(0, 1), (2, 3)], [(1, 0), (3, 2)]]);
        assert_eq!(recall.state().lanes.len(), 0);
    });
}

/// Does what the control thread does for port 0. Returns the lanes that the thread holds in the end.
fn restart(recall: &Recall<(), (), ()>, lcores: &[u32]) -> Lanes {
    let taken = recall.take(Wanted::At(0..1), lcores);
    if taken.len() < lcores.len() {
        return taken.into_iter().map(|(_, lane)| lane).collect();
    }
    recall.give(taken, lcores);
    Vec::new()
}

#[test]
fn a_stop_at_any_time_leaves_each_lane_in_one_place() {
    model(Some(3), || {
        let recall = Arc::new(Recall::new(&StopFlag::new()));
        let lcore = start(&recall, 0, vec![lane(0, 0), lane(1, 1)]);
        let stopper = Arc::clone(&recall);
        let stopper = thread::spawn(move || stop(&stopper));
        let mut lanes = restart(&recall, &[0]);
        lanes.extend(lcore.join().unwrap());
        stopper.join().unwrap();
        lanes.extend(Arc::into_inner(recall).unwrap().into_lanes());
        assert_eq!(ends(&lanes), [(0, 0), (1, 1)]);
    });
}

#[test]
fn an_lcore_that_stops_leaves_each_lane_in_one_place() {
    model(Some(3), || {
        let recall = Arc::new(Recall::new(&StopFlag::new()));
        let polling = start(&recall, 0, vec![lane(0, 1)]);
        let stopping = Arc::clone(&recall);
        let stopping = thread::spawn(move || {
            let mut lanes = vec![lane(1, 0)];
            if stopping.stop.is_raised() {
                stopping.visit(1, &mut lanes);
            }
            stop(&stopping);
            lanes
        });
        let mut lanes = restart(&recall, &[0, 1]);
        lanes.extend([polling, stopping].into_iter().flat_map(|lcore| lcore.join().unwrap()));
        lanes.extend(Arc::into_inner(recall).unwrap().into_lanes());
        assert_eq!(ends(&lanes), [(0, 1), (1, 0)]);
    });
}
