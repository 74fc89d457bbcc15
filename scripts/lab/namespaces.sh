# shellcheck shell=bash
# Three hosts natively: a network namespace each, the server joined to each client by a veth pair. Root makes them as
# it is, anyone else in a user namespace of their own. They have no names, and each lives as long as a process that
# holds it, which ends with this script, so nothing can stay behind. Uses say.sh.

readonly SERVER_ADDRESS_1=10.199.1.1 CLIENT_ADDRESS_1=10.199.1.2
readonly SERVER_ADDRESS_2=10.199.2.1 CLIENT_ADDRESS_2=10.199.2.2
readonly WIDE_PORT_RANGE='10000 65535' # above the server's ports; as in the guests

declare -A holder_of=() # host -> pid of the process that holds its namespace

# namespaces_create CONNECTIONS
namespaces_create() {
    namespaces_possible ||
        fail "three hosts natively want ip, unshare, nsenter and setpriv (Debian: apt-get install iproute2 util-linux), and root or user namespaces; or run with --vm"
    local host
    # A namespace has a hash table of its own for its connections if the one that it is made in says so.
    namespace_hold cradle unshare "${NAMESPACE_USER[@]}" --net
    namespace_set cradle net/ipv4/tcp_child_ehash_entries "$1"
    for host in server client-1 client-2; do
        namespace_enter cradle
        namespace_hold "$host" "${ENTER[@]}" unshare --net
        in_namespace "$host" ip link set lo up
        namespace_set "$host" net/ipv4/ip_local_port_range "$WIDE_PORT_RANGE"
    done
    namespaces_join 1 "$SERVER_ADDRESS_1" "$CLIENT_ADDRESS_1"
    namespaces_join 2 "$SERVER_ADDRESS_2" "$CLIENT_ADDRESS_2"
}

# Sets NAMESPACE_USER to what unshare needs beside --net.
namespaces_possible() {
    local tool
    for tool in ip unshare nsenter setpriv; do
        command -v "$tool" >/dev/null || return
    done
    NAMESPACE_USER=()
    unshare --net true 2>/dev/null && return
    NAMESPACE_USER=(--user --map-root-user)
    unshare "${NAMESPACE_USER[@]}" --net true 2>/dev/null
}

namespaces_in_use() {
    ((${#holder_of[@]} > 0))
}

# namespace_hold HOST COMMAND...: what the command makes belongs to HOST from now on.
namespace_hold() {
    local host=$1 held
    shift
    exec {held}< <(exec "$@" setpriv --pdeathsig KILL sh -c 'echo held && exec sleep infinity' 2>/dev/null)
    holder_of[$host]=$!
    read -r -t 10 _ <&"$held" || fail "the namespace of '$host' could not be made: '$*' failed"
    exec {held}<&-
}

# namespace_enter HOST: sets ENTER to the words that run a command there.
namespace_enter() {
    ENTER=(nsenter --target "${holder_of[$1]}" --net)
    ((${#NAMESPACE_USER[@]} == 0)) || ENTER+=(--user --preserve-credentials)
}

in_namespace() {
    namespace_enter "$1"
    "${ENTER[@]}" "${@:2}"
}

# namespace_set HOST SETTING VALUE; kernels before 6.1 have not all of them.
namespace_set() {
    [[ -e /proc/sys/$2 ]] || return 0
    # shellcheck disable=SC2016 # expanded by the inner shell
    in_namespace "$1" sh -c 'echo "$1" >"/proc/sys/$0"' "$2" "$3"
}

# namespaces_join NUMBER SERVER_ADDRESS CLIENT_ADDRESS
namespaces_join() {
    in_namespace server ip link add "eth$1" type veth peer name eth0 netns "${holder_of[client-$1]}"
    in_namespace server ip address add "$2/24" dev "eth$1"
    in_namespace "client-$1" ip address add "$3/24" dev eth0
    in_namespace server ip link set "eth$1" up
    in_namespace "client-$1" ip link set eth0 up
}

namespaces_remove() {
    local host
    for host in "${!holder_of[@]}"; do
        kill -KILL "${holder_of[$host]}" 2>/dev/null || true
    done
    holder_of=()
}
