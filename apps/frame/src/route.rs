//! Which lcore polls which port, and where its packets go.

use std::collections::BTreeSet;

use vireo_eal::{Error, ErrorKind, Result};

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

/// Distributes `ways`, each a `(from, to)` pair of ports with `pairs` queue pairs, over `lcores`. Each lcore
/// polls up to `most` queues, or an equal share if `most` is `None`. The first queue of every way is assigned
/// before the second.
///
/// # Errors
/// `Unavailable` when there are no ways, `Usage` when there are too few lcores.
pub fn assign_lcores(
    ways: &[(usize, usize)],
    pairs: u16,
    lcores: &[u32],
    most: Option<usize>,
) -> Result<Vec<Route>> {
    let count = ways.len() * usize::from(pairs);
    let what = format!("cannot poll {count} RX queues");
    if count == 0 {
        return Err(no_ports(what));
    }
    let each = most.unwrap_or(count.div_ceil(lcores.len().max(1)));
    if lcores.len() * each < count {
        let why = format!("too few lcores (lcores: {}, queues per lcore: {each})", lcores.len());
        return Err(Error::new(ErrorKind::Usage, what, why));
    }
    let queues = (0..pairs.into()).flat_map(|pair| ways.iter().map(move |way| (pair, *way)));
    let lcores = lcores.iter().flat_map(|lcore| std::iter::repeat_n(*lcore, each));
    Ok(queues.zip(lcores).map(|((pair, (from, to)), lcore)| Route { lcore, from, to, pair }).collect())
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
        let routes = assign_lcores(ways, pairs, lcores, most).unwrap();
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
        let error = assign_lcores(&ways, 2, &[0], Some(2)).unwrap_err();
        assert!(error.to_string().starts_with("cannot poll 4 RX queues: too few lcores (lcores: 1, "));
        assert_eq!(assign_lcores(&[], 1, &[0], None).unwrap_err().kind(), ErrorKind::Unavailable);
    }
}
