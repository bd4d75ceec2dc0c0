package main

import (
	"context"
	"flag"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	api "k8s.io/kubelet/pkg/apis/deviceplugin/v1beta1"
)

const registrationTimeout = 30 * time.Second

// fakeMIG is a device plugin without devices. A container that is given some of its resource finds their made-up UUIDs
// in NVIDIA_VISIBLE_DEVICES, as NVIDIA's plugin writes them with DEVICE_LIST_STRATEGY=envvar.
type fakeMIG struct {
	api.UnimplementedDevicePluginServer
	devices []*api.Device
}

func (plugin *fakeMIG) GetDevicePluginOptions(context.Context, *api.Empty) (*api.DevicePluginOptions, error) {
	return &api.DevicePluginOptions{}, nil
}

func (plugin *fakeMIG) ListAndWatch(_ *api.Empty, stream api.DevicePlugin_ListAndWatchServer) error {
	if err := stream.Send(&api.ListAndWatchResponse{Devices: plugin.devices}); err != nil {
		return err
	}
	<-stream.Context().Done()
	return nil
}

func (plugin *fakeMIG) Allocate(_ context.Context, request *api.AllocateRequest) (*api.AllocateResponse, error) {
	response := &api.AllocateResponse{}
	for _, container := range request.ContainerRequests {
		response.ContainerResponses = append(response.ContainerResponses, &api.ContainerAllocateResponse{
			Envs: map[string]string{"NVIDIA_VISIBLE_DEVICES": strings.Join(container.DevicesIds, ",")},
		})
	}
	return response, nil
}

func runFakeMIG() error {
	resource := flag.String("resource", "nvidia.com/mig-1g.5gb", "name of the resource")
	count := flag.Int("count", 2, "number of devices")
	folder := flag.String("folder", api.DevicePluginPath, "the kubelet's folder of sockets")
	flag.Parse()
	plugin := &fakeMIG{}
	for device := range *count {
		id := fmt.Sprintf("MIG-%08x-0000-5000-8000-000000000000", device+1)
		plugin.devices = append(plugin.devices, &api.Device{ID: id, Health: api.Healthy})
	}
	name := "fake-mig-" + strings.NewReplacer("/", "-", ".", "-").Replace(*resource) + ".sock"
	socket := filepath.Join(*folder, name)
	if err := os.Remove(socket); err != nil && !os.IsNotExist(err) {
		return err
	}
	listener, err := net.Listen("unix", socket)
	if err != nil {
		return err
	}
	server := grpc.NewServer()
	api.RegisterDevicePluginServer(server, plugin)
	ended := make(chan error, 1)
	go func() { ended <- server.Serve(listener) }()
	if err := register(*folder, &api.RegisterRequest{Version: api.Version, Endpoint: name, ResourceName: *resource}); err != nil {
		return err
	}
	fmt.Printf("%d of %s\n", *count, *resource)
	return <-ended
}

// register tells the kubelet of a plugin; it waits for a kubelet that is about to start.
func register(folder string, request *api.RegisterRequest) error {
	target := "unix://" + filepath.Join(folder, "kubelet.sock")
	kubelet, err := grpc.NewClient(target, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		return err
	}
	defer kubelet.Close()
	ctx, cancel := context.WithTimeout(context.Background(), registrationTimeout)
	defer cancel()
	_, err = api.NewRegistrationClient(kubelet).Register(ctx, request, grpc.WaitForReady(true))
	return err
}
