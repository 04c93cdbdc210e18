//! Which lcore polls which port, and where its packets go.

use std::collections::BTreeSet;

use vireo_eal::{Eal, Error, ErrorKind, Result};

/// Processes that share the ports of a run, each of which polls its own queues.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Processes {
    count: u16,
    own: u16,
    is_secondary: bool,
}

impl Default for Processes {
    /// One process, which shares nothing.
    fn default() -> Self {
        Self { count: 1, own: 0, is_secondary: false }
    }
}

impl Processes {
    /// Describes `count` processes, of which this one has the number `own` (`--num-procs` and `--proc-id` of DPDK's
    /// `symmetric_mp`). `eal` knows whether this is a secondary process (`--proc-type`).
    ///
    /// # Errors
    /// `Usage` when there is no process `own`, or when a secondary process is the only one.
    pub fn new(eal: &Eal, count: u16, own: u16) -> Result<Self> {
        let is_secondary = eal.primary().is_some();
        if own >= count {
            let why = format!("there are {count} processes (--num-procs), numbered from 0");
            return Err(Error::new(ErrorKind::Usage, format!("cannot use --proc-id {own}"), why));
        }
        if is_secondary && count == 1 {
            let why = "a secondary process polls a part of the queues";
            return Err(Error::new(ErrorKind::Usage, "cannot use --proc-type secondary", why)
                .with_hint("give --num-procs and --proc-id, and the same --num-procs to the primary"));
        }
        Ok(Self { count, own, is_secondary })
    }

    /// Number of processes.
    pub fn count(&self) -> u16 {
        self.count
    }

    /// Number of this process.
    pub fn own(&self) -> u16 {
        self.own
    }

    /// Whether this process polls the queues of `process`. A primary polls them while no other process does.
    pub fn polls(&self, process: u16) -> bool {
        !self.is_secondary || process == self.own
    }

    /// Whether this process starts and resets the ports.
    pub(crate) fn owns(&self) -> bool {
        !self.is_secondary
    }

    /// Number of RX queues that this process polls if there are `queues`.
    pub fn part(&self, queues: usize) -> usize {
        (0..queues).filter(|index| self.polls(self.owner(*index, queues))).count()
    }

    /// Returns the process that polls the RX queue at `index` of `queues`.
    fn owner(&self, index: usize, queues: usize) -> u16 {
        (index * usize::from(self.count) / queues) as u16
    }
}

/// One direction of forwarding, and the lcore that polls it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Route {
    /// ID of the lcore.
    pub lcore: u32,
    /// Port that the lcore polls.
    pub from: usize,
    /// Port that the lcore sends on.
    pub to: usize,
    /// Number of the queue pair, the same on both ports.
    pub pair: usize,
    /// Number of the process that polls the queues.
    pub process: u16,
}

impl Route {
    /// Returns the numbers of the ports in `routes`.
    pub fn ports(routes: &[Self]) -> BTreeSet<usize> {
        routes.iter().flat_map(|route| [route.from, route.to]).collect()
    }
}

/// Pairs up `ports` in order, and returns both directions of each pair as `(from, to)`. If the number of
/// ports is odd, the last one forwards to itself.
pub fn neighbors(ports: impl IntoIterator<Item = usize>) -> Vec<(usize, usize)> {
    let ports: Vec<usize> = ports.into_iter().collect();
    let both = |pair: &[usize]| match *pair {
        [a, b] => vec![(a, b), (b, a)],
        _ => pair.iter().map(|port| (*port, *port)).collect(),
    };
    ports.chunks(2).flat_map(both).collect()
}

/// Distributes `ways`, each a `(from, to)` pair of ports with `pairs` queue pairs, over `processes`, and the part of
/// this process over `lcores`. Each lcore polls up to `most` queues, or an equal share if `most` is `None`. The first
/// queue of every way is assigned before the second. Routes that this process never polls have its first lcore.
///
/// # Errors
/// `Unavailable` when there are no ways, `Usage` when there are too few lcores, or more processes than queues.
pub fn assign_lcores(
    ways: &[(usize, usize)],
    pairs: u16,
    lcores: &[u32],
    most: Option<usize>,
    processes: Processes,
) -> Result<Vec<Route>> {
    let count = ways.len() * usize::from(pairs);
    if count == 0 {
        return Err(no_ports("cannot poll 0 RX queues"));
    }
    if count < processes.count.into() {
        let what = format!("cannot share {count} RX queues among {} processes", processes.count);
        return Err(Error::new(ErrorKind::Usage, what, "each polls one or more")
            .with_hint(format!("use --num-procs {count}, or more queues")));
    }
    let polled = processes.part(count);
    let each = most.unwrap_or(polled.div_ceil(lcores.len().max(1)));
    if lcores.len() * each < polled {
        let what = format!("cannot poll {polled} RX queues");
        let why = format!("too few lcores (lcores: {}, queues per lcore: {each})", lcores.len());
        return Err(Error::new(ErrorKind::Usage, what, why));
    }
    let queues = (0..pairs.into()).flat_map(|pair| ways.iter().map(move |way| (pair, *way)));
    let mut free = lcores.iter().flat_map(|lcore| std::iter::repeat_n(*lcore, each));
    let route = |(index, (pair, (from, to)))| {
        let process = processes.owner(index, count);
        let lcore = if processes.polls(process) { free.next() } else { lcores.first().copied() };
        Route { lcore: lcore.unwrap_or_default(), from, to, pair, process }
    };
    Ok(queues.enumerate().map(route).collect())
}

/// Creates the error of a program that cannot do `what` because it finds no ports.
pub fn no_ports(what: impl Into<String>) -> Error {
    Error::new(ErrorKind::Unavailable, what, "there are no ports")
        .with_hint("bind NICs to VFIO: vireo-devbind --status, vireo-devbind --bind vfio-pci ADDRESS")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn neighbours_are_paired_and_the_odd_one_echoes() {
        assert_eq!(neighbors([0, 2, 5]), [(0, 2), (2, 0), (5, 5)]);
        assert_eq!(neighbors([]), []);
    }

    fn shared(ways: &[(usize, usize)], pairs: u16, lcores: &[u32], most: Option<usize>) -> Vec<[usize; 4]> {
        let routes = assign_lcores(ways, pairs, lcores, most, Processes::default()).unwrap();
        routes.iter().map(|route| [route.lcore as usize, route.from, route.to, route.pair]).collect()
    }

    #[test]
    fn lcores_take_their_queues_in_turn() {
        let ways = neighbors(0..4);
        let two_each = [[1, 0, 1, 0], [1, 1, 0, 0], [3, 2, 3, 0], [3, 3, 2, 0]];
        assert_eq!(shared(&ways, 1, &[1, 3], Some(2)), two_each);
        assert_eq!(shared(&ways, 1, &[1, 3], None), two_each);
        assert_eq!(shared(&ways, 1, &[1, 3, 4, 5, 6], None).len(), 4);
    }

    #[test]
    fn an_lcore_has_the_same_queue_of_both_ports() {
        let ways = neighbors(0..2);
        let lanes = [[0, 0, 1, 0], [0, 1, 0, 0], [1, 0, 1, 1], [1, 1, 0, 1]];
        assert_eq!(shared(&ways, 2, &[0, 1], Some(2)), lanes);
        let one = Processes::default();
        let error = assign_lcores(&ways, 2, &[0], Some(2), one).unwrap_err();
        assert!(error.to_string().starts_with("cannot poll 4 RX queues: too few lcores (lcores: 1, "));
        assert_eq!(assign_lcores(&[], 1, &[0], None, one).unwrap_err().kind(), ErrorKind::Unavailable);
    }

    #[test]
    fn each_process_has_its_part_and_a_primary_polls_every_part() {
        let ways = neighbors(0..2);
        let of = |count, own, is_secondary| {
            let routes = assign_lcores(&ways, 2, &[4, 5], Some(2), Processes { count, own, is_secondary });
            routes.map(|routes| routes.iter().map(|route| (route.process, route.lcore)).collect::<Vec<_>>())
        };
        assert_eq!(of(2, 0, false).unwrap(), [(0, 4), (0, 4), (1, 5), (1, 5)]);
        assert_eq!(of(2, 1, true).unwrap(), [(0, 4), (0, 4), (1, 4), (1, 4)]);
        assert_eq!(of(4, 3, true).unwrap(), [(0, 4), (1, 4), (2, 4), (3, 4)]);
        assert_eq!(of(3, 0, false).unwrap(), [(0, 4), (0, 4), (1, 5), (2, 5)]);
        assert!(of(5, 0, false).unwrap_err().to_string().ends_with("use --num-procs 4, or more queues"));
    }
}
